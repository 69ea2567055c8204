"""The paged cache: no block is lost or allocated twice, int8 is close, and the engine releases all blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xverse.config import UserError
from xverse.engine import Engine, Request, SamplingParams
from xverse.engine.cache import BLOCK_SIZE, BlockPool, PagedCache, RaggedContext, SequenceCache
from xverse.formats import load_model, load_tokenizer, resolve
from xverse.model.attention import FullCausal

GREEDY = SamplingParams(temperature=0)
NEVER = (10**6,)


@given(st.integers(1, 8), st.lists(st.tuples(st.sampled_from("tsr"), st.integers(0, 10**6)), max_size=80))
def test_blocks_are_held_as_often_as_they_were_taken(count: int, actions: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(count), Counter[int]()
    for action, pick in actions:
        holders = sorted(held.elements())
        if action == "t" and pool.free:
            block = pool.take()
            assert 0 <= block < count
            assert block not in held
            held[block] = 1
        elif action == "t":
            with pytest.raises(IndexError):
                pool.take()
        elif holders:
            block = holders[pick % len(holders)]
            if action == "s":
                pool.share(block)
                held[block] += 1
            else:
                pool.release(block)
                held -= Counter({block: 1})
        assert pool.free == count - len(held)
    for block in range(count):
        if block not in held:
            with pytest.raises(AssertionError):
                pool.release(block)


def test_every_block_comes_back(tiny_model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(tiny_model, tiny_tokenizer, max_cache_tokens=400, prefill_chunk=20, prefix_cache_bytes=0)
    pool = engine._cache.pool
    everything = pool.free
    requests = [
        Request(prompt_ids=[5 + n] * (30 * n + 1), sampling=SamplingParams.greedy(6), stop_ids=NEVER)
        for n in range(4)
    ]
    handles = [engine.submit(request) for request in requests]
    engine.step()
    assert pool.free < everything
    engine.cancel(handles[0])
    engine.cancel(handles[3])
    while engine.busy:
        engine.step()
    assert pool.free == everything

    stream = engine.stream(requests[1])
    next(stream)
    stream.close()  # as a client that disconnects
    assert pool.free == everything
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[9] = torch.nan
    (event,) = engine.stream(Request(prompt_ids=[9], sampling=SamplingParams(max_new_tokens=20)))
    assert event.finish_reason == "error"
    assert pool.free == everything


def test_a_full_cache_makes_requests_wait(tiny_model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(tiny_model, tiny_tokenizer, max_batch=3, max_cache_tokens=3 * 33)
    request = Request(prompt_ids=[7] * 30, sampling=SamplingParams.greedy(3), stop_ids=NEVER)
    handles = [engine.submit(request) for _ in range(7)]  # 33 positions each: a block and one position
    ended = []
    while engine.busy:
        ended += [event.handle for event in engine.step() if event.finish_reason]
    assert sorted(ended) == handles


def test_another_kv_dtype_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="kv_dtype: 'int4' is not one of auto, int8"):
        Engine(tiny_model, tiny_tokenizer, kv_dtype="int4")


def test_a_cache_beyond_the_memory_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"take \d+\.\d GB, but only .* are free; at most \d+ fit"):
        Engine(tiny_model, tiny_tokenizer, max_cache_tokens=10**12)
    with pytest.raises(UserError, match="max_cache_tokens: 0 is out of range"):
        Engine(tiny_model, tiny_tokenizer, max_cache_tokens=0)


def test_no_room_is_an_error_of_one_line(tiny_config: Any) -> None:
    with pytest.raises(UserError, match="max_cache_tokens: not enough memory for 32"):
        PagedCache(tiny_config, torch.float32, torch.device("cpu"), blocks=10**12, sequences=1)


@pytest.fixture(scope="module")
def nano() -> Any:
    path = resolve("nano")
    return load_model(path, torch.float32), load_tokenizer(path)


TEXT = "Die Sonne scheint, und the children are playing outside. 今天天气很好，我们去公园散步。" * 4


def prefilled(model: Any, ids: list[int], kv_dtype: str, chunk: int) -> torch.Tensor:
    """Logits [T, V] of ``ids``, computed chunk by chunk with a cache."""
    dtype = model.lm_head.weight.dtype
    blocks = len(ids) // BLOCK_SIZE + 1
    cache = PagedCache(
        model.config, dtype, torch.device("cpu"), blocks=blocks, sequences=1, kv_dtype=kv_dtype
    )
    sequence, logits = SequenceCache(cache, len(ids)), []
    with torch.inference_mode():
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            sequence.reserve(start + len(part))
            logits.append(model(torch.tensor([part]), RaggedContext([(sequence, len(part))]))[0])
            sequence.length += len(part)
    return torch.cat(logits).float()


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL of rows of logits, in nats."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_stays_close(nano: Any, dtype: torch.dtype) -> None:
    model, tokenizer = nano[0].to(dtype), nano[1]
    try:
        ids = tokenizer.encode(TEXT)
        with torch.inference_mode():
            exact = model(torch.tensor([ids]), FullCausal(1, len(ids)))[0].float()  # [T, V]
        auto = divergence(exact, prefilled(model, ids, "auto", 50))
        int8 = divergence(exact, prefilled(model, ids, "int8", 50))
    finally:
        model.to(torch.float32)
    assert auto < (1e-8 if dtype == torch.float32 else 1e-3)
    assert int8 < 2e-3


def test_decode_with_int8_follows_prefill(nano: Any) -> None:
    model, tokenizer = nano
    prompt = tokenizer.encode(TEXT)[:40]
    engine = Engine(model, tokenizer, kv_dtype="int8")
    events = list(
        engine.stream(
            Request(prompt_ids=prompt, sampling=SamplingParams.greedy(50), stop_ids=NEVER, logprobs=0)
        )
    )
    ids = prompt + [event.token_id for event in events if event.token_id is not None]
    logprobs = prefilled(model, ids, "int8", len(ids)).log_softmax(-1)
    for at, event in enumerate(events):
        assert event.logprob is not None
        assert event.logprob.logprob == pytest.approx(float(logprobs[39 + at, event.token_id]), abs=0.02)
