"""The engine on CUDA gives the greedy tokens that it gives on the CPU, recorded graphs and all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from xverse.engine import Engine, Request, SamplingParams, Speculation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def generate(engine: Engine, prompts: list[list[int]], new_tokens: int = 40) -> list[list[int | None]]:
    handles = [
        engine.submit(
            Request(prompt_ids=prompt, sampling=SamplingParams.greedy(new_tokens), stop_ids=(10**6,))
        )
        for prompt in prompts
    ]
    said: dict[int, list[int | None]] = {handle: [] for handle in handles}
    while engine.busy:
        for event in engine.step():
            said[event.handle].append(event.token_id)
    return list(said.values())


PROMPTS = [[5, 6], [20, 30] * 20, [(7 * n) % 200 + 4 for n in range(90)]]


@pytest.fixture
def model(tiny_model: Any) -> Any:
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # no greedy choice hangs on rounding
    return tiny_model


@pytest.mark.parametrize("speculation", [None, Speculation()])
def test_greedy_tokens_are_the_cpus(model: Any, tiny_tokenizer: Any, speculation: Speculation | None) -> None:
    on_cpu = generate(Engine(copy.deepcopy(model), tiny_tokenizer), PROMPTS)
    engine = Engine(model.cuda(), tiny_tokenizer, max_cache_tokens=4096, speculation=speculation)
    assert generate(engine, PROMPTS) == on_cpu
    assert engine._fused_step is not None
    assert len(engine._fused_step._graphs) == 11  # type: ignore[union-attr]
    assert generate(engine, PROMPTS) == on_cpu  # replayed, and from the prefix cache


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_bfloat16_and_int8_cache_run(model: Any, tiny_tokenizer: Any, kv_dtype: str) -> None:
    engine = Engine(model.to(torch.bfloat16).cuda(), tiny_tokenizer, max_cache_tokens=4096, kv_dtype=kv_dtype)
    assert [len(each) for each in generate(engine, PROMPTS)] == [40, 40, 40]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_run(wide_config: Any, tiny_tokenizer: Any, bits: int) -> None:
    from xverse.bench.weights import random_model

    model = random_model(wide_config, torch.bfloat16, f"int{bits}").cuda()
    engine = Engine(model, tiny_tokenizer, max_cache_tokens=4096)
    assert [len(each) for each in generate(engine, PROMPTS)] == [40, 40, 40]


def test_sampling_repeats_by_its_seed(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model.cuda(), tiny_tokenizer, max_cache_tokens=4096)
    request = Request(
        prompt_ids=[5, 6],
        sampling=SamplingParams(max_new_tokens=20, seed=3, top_k=20, top_p=0.9, repetition_penalty=1.1),
        stop_ids=(10**6,),
    )
    first, second = ([event.token_id for event in engine.stream(request)] for _ in range(2))
    assert first == second


def test_another_gpu_than_the_current_one(model: Any, tiny_tokenizer: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    on_cpu = generate(Engine(copy.deepcopy(model), tiny_tokenizer), PROMPTS)
    engine = Engine(model.to("cuda:1"), tiny_tokenizer, max_cache_tokens=4096)
    assert torch.cuda.current_device() == 0
    assert generate(engine, PROMPTS) == on_cpu


def test_the_default_cache_leaves_room_for_steps(tiny_tokenizer: Any) -> None:
    """Of XVERSE-7B's size in two layers: full batches and long prompts run beside the largest cache."""
    import dataclasses

    from xverse.bench.weights import random_model
    from xverse.model import named_shape

    size = tiny_tokenizer.vocab_size
    config = dataclasses.replace(named_shape("7b"), num_hidden_layers=2, vocab_size=size)
    engine = Engine(random_model(config, torch.bfloat16).cuda(), tiny_tokenizer)
    free, total = torch.cuda.mem_get_info()
    assert free >= 0.05 * total
    prompts = [[(7 * n + row) % 600 + 4 for n in range(3000)] for row in range(8)]
    assert [len(each) for each in generate(engine, prompts * 8, 8)] == [8] * 64


def test_a_step_reads_the_device_once(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model.cuda(), tiny_tokenizer, max_cache_tokens=4096)
    for seed in range(8):
        sampling = SamplingParams(max_new_tokens=20, seed=seed, top_k=20, top_p=0.9, repetition_penalty=1.1)
        engine.submit(Request(prompt_ids=[5, 6], sampling=sampling, stop_ids=(10**6,)))
    engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.step()
    copies = sum(event.count for event in profile.key_averages() if "Memcpy DtoH" in event.key)
    assert copies == 1
