"""What the engine does on a GPU, as far as it shows without one: on the meta device, and by counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xverse.config import UserError
from xverse.engine import Engine, Request, SamplingParams, Speculation, sizing
from xverse.engine import load as loading
from xverse.engine.cache import BLOCK_SIZE
from xverse.engine.graphs import sizes
from xverse.engine.sizing import capacity
from xverse.formats import ModelDirectory, save_hf
from xverse.formats.quantize import quantize_directory
from xverse.model import XverseForCausalLM, init_weights, named_shape
from xverse.quant.settings import QuantSettings

CUDA, META = torch.device("cuda", 1), torch.device("meta")
GB = 10**9


class Affirm(TorchDispatchMode):
    """Values on the meta device, used here as a GPU, are read as 1, so that checks for NaN pass."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def directory(wide_config: Any, tiny_tokenizer: Any, tmp_path: Path) -> ModelDirectory:
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, tmp_path / "wide", torch.bfloat16)
    return ModelDirectory.of(tmp_path / "wide")


@pytest.mark.parametrize(("quantize", "dtype"), [(None, torch.float16), ("int8", torch.bfloat16)])
def test_every_weight_lands_on_the_device(
    directory: ModelDirectory, quantize: str | None, dtype: torch.dtype
) -> None:
    with Affirm():
        state = loading.load_weights(directory, quantize, dtype, META).state_dict()
    assert {tensor.device for tensor in state.values()} == {META}
    assert {tensor.dtype for tensor in state.values()} - {torch.uint8} == {dtype}


def test_a_stored_quantised_model_lands_on_the_device(
    directory: ModelDirectory, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    quantize_directory(directory, tmp_path / "q", tiny_tokenizer, QuantSettings(bits=4))
    state = loading.load_weights(ModelDirectory.of(tmp_path / "q"), None, torch.bfloat16, META).state_dict()
    assert {tensor.device for tensor in state.values()} == {META}


@pytest.mark.parametrize(
    ("free", "quantize", "message"),
    [
        (12, None, r"1[45]\.\d GB in bfloat16, and cuda:1 has 12\.0 GB free; use --quantize int8 \(.*int4"),
        (6, None, r"use --quantize int4 \(4\.\d GB\), --tensor-parallel 4 on"),
        (6, "int8", r"7\.\d GB in int8, .* use --quantize int4"),
        (2, None, r"use --tensor-parallel 8 on .* --device cpu"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_fits(
    monkeypatch: Any, free: int, quantize: str | None, message: str
) -> None:
    class Published:
        name, scheme, config = "XVERSE-7B", None, named_shape("7b")

    monkeypatch.setattr(loading, "available_memory", lambda device: free * GB)
    with pytest.raises(UserError, match=message) as caught:
        loading.check_room(Published(), CUDA, torch.bfloat16, quantize)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    loading.check_room(Published(), torch.device("cpu"), None, quantize)  # type: ignore[arg-type]


def room(monkeypatch: Any, free: float, total: float, **options: Any) -> sizing.Capacity:
    """The capacity on a GPU for XVERSE-7B in bfloat16: 8,192 positions of 524,288 bytes."""
    monkeypatch.setattr(sizing, "available_memory", lambda device: int(free * GB))
    monkeypatch.setattr(sizing, "total_memory", lambda device: int(total * GB))
    settings: dict[str, Any] = {"context": 8192, "max_batch": 64, **options}
    return capacity(settings.pop("requested", None), 2**19, CUDA, **settings)


def test_the_cache_takes_nine_tenths_of_the_memory_less_what_is_used(monkeypatch: Any) -> None:
    found = room(monkeypatch, free=120, total=140, reserved=4 * GB)
    assert (
        found.blocks * BLOCK_SIZE * 2**19
        <= (0.9 * 140 - 20 - 4) * GB
        < (found.blocks + 1) * BLOCK_SIZE * 2**19
    )
    assert found.tokens == (found.blocks - 64) * BLOCK_SIZE
    most = room(monkeypatch, free=500, total=500)
    assert most == sizing.Capacity(64 * 8192, 64 * 256 + 64)


def test_a_small_cache_limits_the_context_and_is_reported(monkeypatch: Any, capsys: Any) -> None:
    found = room(monkeypatch, free=4, total=12)  # 2.8 GB: 166 blocks, fewer than the 256 of one text
    assert found == sizing.Capacity(166 * BLOCK_SIZE, 166)
    assert "holds 5312 tokens" in capsys.readouterr().err
    spare = room(monkeypatch, free=6, total=12)  # 4.8 GB: 286 blocks, 30 of them spare
    assert spare == sizing.Capacity(8192, 286)
    with pytest.raises(UserError, match=r"cuda:1: no memory is left .* --quantize"):
        room(monkeypatch, free=1.25, total=12)
    with pytest.raises(UserError, match=r"max_cache_tokens: 9000 tokens take 4.7 GB, but only 2.8 GB"):
        room(monkeypatch, free=4, total=12, requested=9000)
    assert room(monkeypatch, free=4, total=12, requested=5000).tokens == 5000


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 33, 64])
def test_graphs_pad_by_less_than_eight_tokens(most: int) -> None:
    recorded = sizes(most)
    assert recorded == sorted(set(recorded))
    for count in range(1, most + 1):
        assert min(size for size in recorded if size >= count) < max(2 * count, count + 8)


def test_a_limited_context_ends_replies_early(model: Any, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    engine = Engine(model, tiny_tokenizer)
    engine.context_length = 48
    events = list(
        engine.stream(Request(prompt_ids=[5] * 40, sampling=SamplingParams.greedy(100), stop_ids=(10**6,)))
    )
    assert [event.finish_reason for event in events][-1] == "length"
    assert len(events) == 8
    with pytest.raises(UserError, match="leave no room in a context of 48"):
        engine.submit(Request(prompt_ids=[5] * 48))


class Even:
    """A constraint that allows even ids. Without tokens that are proposed: each of these is chosen by itself,
    because the mask depends on those before."""

    def __init__(self, size: int) -> None:
        self.mask = torch.arange(size) % 2 == 0

    def allowed(self) -> torch.Tensor:
        return self.mask

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == 0

    def forced(self) -> list[int]:
        return []


class Reads:
    """Counts how often the host waits for a tensor's value."""

    def __init__(self, monkeypatch: Any) -> None:
        self.count = 0
        for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, method: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return method(*args, **kwargs)

        return counted


@pytest.mark.parametrize("speculation", [None, Speculation()])
def test_a_step_waits_for_the_device_once(
    model: Any, tiny_tokenizer: Any, monkeypatch: Any, speculation: Speculation | None
) -> None:
    """Greedy and sampled requests, penalties, biases, log-probabilities and constraints in one batch."""
    engine = Engine(model, tiny_tokenizer, speculation=speculation)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
        {"seed": 3, "top_p": 0.5, "presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"seed": 4, "min_p": 0.1, "logit_bias": {7: 2.0}},
        {"temperature": 0, "repetition_penalty": 1.1},
    ]
    size = tiny_tokenizer.vocab_size
    for values in kinds:
        for logprobs, constraint in ((None, None), (3, None), (None, Even(size)), (2, Even(size))):
            if constraint is not None and speculation is not None:
                continue
            sampling = SamplingParams(max_new_tokens=12, **values)
            prompt = [4, 8, 12, 16] * 4
            engine.submit(
                Request(
                    prompt_ids=prompt,
                    sampling=sampling,
                    stop_ids=(),
                    logprobs=logprobs,
                    constraint=constraint,
                )
            )
    for sequence in engine._scheduler.waiting:
        if sequence.dice is not None:
            sequence.dice[40]  # drawn on the host, 64 at a time
    reads, steps = Reads(monkeypatch), 0
    while engine.busy:
        before = reads.count
        events = engine.step()
        assert not any(event.error for event in events)
        assert reads.count - before <= 1
        steps += 1
    assert steps >= 3
