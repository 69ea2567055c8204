"""The padded steps of CUDA graphs, run without CUDA, give the same tokens as the engine without them."""

from __future__ import annotations

from typing import Any

import pytest

from xverse.engine import Engine, Request, SamplingParams, Speculation
from xverse.engine.graphs import DecodeGraphs

GREEDY = SamplingParams(temperature=0)
NEVER = (10**6,)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("speculation", [None, Speculation()])
def test_padded_steps_change_nothing(
    model: Any, tiny_tokenizer: Any, kv_dtype: str, speculation: Speculation | None
) -> None:
    prompts = [[5, 6], [20, 30] * 20, [(7 * n) % 200 + 4 for n in range(90)]]
    found = []
    for padded in (False, True):
        engine = Engine(model, tiny_tokenizer, kv_dtype=kv_dtype, speculation=speculation)
        engine._fused_step = DecodeGraphs(model, engine._cache) if padded else None
        handles = [
            engine.submit(Request(prompt_ids=prompt, sampling=SamplingParams.greedy(40), stop_ids=NEVER))
            for prompt in prompts
        ]
        said: dict[int, list[int | None]] = {handle: [] for handle in handles}
        while engine.busy:
            for event in engine.step():
                said[event.handle].append(event.token_id)
        found.append(list(said.values()))
        if padded:
            assert engine._fused_step is not None
            assert len(engine._fused_step._inputs.tokens) == 64  # type: ignore[union-attr]
    assert found[0] == found[1]
