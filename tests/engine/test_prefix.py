"""The prefix cache: computed blocks are reused, within its limit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xverse.config import UserError
from xverse.engine import Engine, Request, SamplingParams
from xverse.engine.cache import BLOCK_SIZE, BlockPool, position_bytes
from xverse.engine.prefix import PrefixCache, extend_digests

GREEDY = SamplingParams(temperature=0)
NEVER = (10**6,)


def digests(tokens: list[int], salt: bytes = b"") -> list[bytes]:
    found: list[bytes] = []
    extend_digests(found, tokens, salt)
    return found


def test_a_digest_stands_for_the_block_and_all_before_it() -> None:
    text = list(range(100))
    whole = digests(text)
    assert len(whole) == 100 // BLOCK_SIZE
    assert digests(text[:64]) == whole[:2]
    grown = digests(text[:40])
    extend_digests(grown, text)
    assert grown == whole
    changed = digests([99, *text[1:]])
    assert not set(changed) & set(whole)
    assert not set(digests(text, b"other")) & set(whole)


@given(
    most=st.integers(0, 5),
    actions=st.lists(st.tuples(st.sampled_from("aftr"), st.integers(0, 9), st.integers(1, 4)), max_size=60),
)
def test_it_keeps_to_its_bound_and_frees_only_what_nobody_uses(
    most: int, actions: list[tuple[str, int, int]]
) -> None:
    pool = BlockPool(12)
    cache = PrefixCache(pool, most)
    used: list[int] = []  # blocks that a request holds
    names = [bytes([number]) for number in range(10)]
    for action, number, count in actions:
        if action == "a" and pool.free:
            block = pool.take()
            used.append(block)
            cache.add(names[number], block)
        elif action == "f":
            before, idle = pool.free, cache.idle()
            assert cache.free(count) == min(count, idle)
            assert pool.free == before + min(count, idle)
        elif action == "t":
            cache.touch(names[number : number + count])
        elif action == "r" and used:
            pool.release(used.pop(number % len(used)))
        assert len(cache) <= most
        assert all(pool.holders(block) for name in names for block in cache.find([name]))
        assert all(pool.holders(block) for block in used)
    for block in used:
        pool.release(block)
    cache.free(most)
    assert pool.free == 12


def test_the_end_of_a_text_goes_before_its_beginning() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, 3)
    chain = [b"1", b"2", b"3"]
    for digest in chain:
        block = pool.take()
        cache.add(digest, block)
        pool.release(block)
    cache.touch(chain)  # as when a request ends
    assert cache.free(1) == 1
    assert len(cache.find(chain)) == 2


def ask(engine: Engine, prompt: list[int], new_tokens: int = 4) -> list[int | None]:
    request = Request(prompt_ids=prompt, sampling=SamplingParams.greedy(new_tokens), stop_ids=NEVER)
    return [event.token_id for event in engine.stream(request)]


def test_a_repeated_beginning_is_reused(model: Any, tiny_tokenizer: Any, naive: Any) -> None:
    engine = Engine(model, tiny_tokenizer)
    text = [(11 * n) % 200 + 4 for n in range(100)]
    first = ask(engine, text, 40)
    assert engine.stats().reused_tokens == 0
    assert ask(engine, text, 40) == first == naive(model, text, 40)
    assert engine.stats().reused_tokens == 96
    again = Request(prompt_ids=text, sampling=SamplingParams.greedy(3), stop_ids=NEVER)
    assert [event.cached_tokens for event in engine.stream(again)] == [96] * 3
    # The reply is part of the next turn's prompt and is reused, too: 139 tokens were computed.
    turn = text + [token for token in first if token is not None] + [7, 8]
    assert ask(engine, turn) == naive(model, turn, 4)
    assert engine.stats().reused_tokens == 2 * 96 + 128
    # The last block of a prompt is always computed, because its logits are needed.
    assert ask(engine, text[:64]) == naive(model, text[:64], 4)
    assert engine.stats().reused_tokens == 2 * 96 + 128 + 32


def test_requests_that_come_together_compute_their_beginning_once(
    model: Any, tiny_tokenizer: Any, naive: Any
) -> None:
    engine = Engine(model, tiny_tokenizer, prefill_chunk=40)
    shared = [(13 * n) % 200 + 4 for n in range(96)]
    prompts = [shared + [20 + n] * 5 for n in range(6)]
    handles = [
        engine.submit(Request(prompt_ids=prompt, sampling=SamplingParams.greedy(3), stop_ids=NEVER))
        for prompt in prompts
    ]
    got: dict[int, list[int | None]] = {handle: [] for handle in handles}
    while engine.busy:
        for event in engine.step():
            got[event.handle].append(event.token_id)
    assert list(got.values()) == [naive(model, prompt, 3) for prompt in prompts]
    assert engine.stats().reused_tokens == 5 * 96


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_equal_prompts_that_come_together_are_computed_once(
    model: Any, tiny_tokenizer: Any, naive: Any, kv_dtype: str
) -> None:
    """Also the last block, which is only partly filled, and of prompts shorter than a block."""
    half = model if kv_dtype == "auto" else copy.deepcopy(model).bfloat16()
    engine = Engine(half, tiny_tokenizer, prefill_chunk=64, kv_dtype=kv_dtype, max_batch=20)
    texts = [[(13 * n) % 200 + length for n in range(length)] for length in (1, 20, 32, 33, 50)]
    asked = [text for text in texts for _ in range(4)]
    sampling = SamplingParams.greedy(12)
    requests = [Request(prompt_ids=text, sampling=sampling, stop_ids=NEVER) for text in asked]
    handles = [engine.submit(request) for request in requests]
    got: dict[int, list[int | None]] = {handle: [] for handle in handles}
    while engine.busy:
        for event in engine.step():
            got[event.handle].append(event.token_id)
    alone = Engine(half, tiny_tokenizer, prefix_cache_bytes=0, kv_dtype=kv_dtype)
    expected = [ask(alone, text, 12) for text in texts for _ in range(4)]
    assert list(got.values()) == expected
    assert kv_dtype == "int8" or expected == [naive(model, text, 12) for text in asked]
    assert engine.stats().reused_tokens == sum(3 * (len(text) - 1) for text in texts)


def test_it_is_bounded_and_can_be_off(model: Any, tiny_tokenizer: Any) -> None:
    size = BLOCK_SIZE * position_bytes(model.config, torch.float32)
    engine = Engine(model, tiny_tokenizer, prefix_cache_bytes=3 * size + 1)
    for start in range(4, 200, 40):
        ask(engine, [start + n % 7 for n in range(100)])
        assert engine.stats().cached_blocks <= 3
    off = Engine(model, tiny_tokenizer, prefix_cache_bytes=0)
    for _ in range(2):
        ask(off, [5] * 100)
    assert off.stats().reused_tokens == off.stats().cached_blocks == 0
    with pytest.raises(UserError, match="prefix_cache_bytes: -1 is out of range"):
        Engine(model, tiny_tokenizer, prefix_cache_bytes=-1)


def test_a_cancelled_prompt_does_not_hold_up_those_that_waited_for_it(
    model: Any, tiny_tokenizer: Any, naive: Any
) -> None:
    engine = Engine(model, tiny_tokenizer, prefill_chunk=8)
    text = [(17 * n) % 200 + 4 for n in range(90)]
    first = engine.submit(Request(prompt_ids=text, sampling=SamplingParams.greedy(3), stop_ids=NEVER))
    engine.step()
    second = engine.submit(Request(prompt_ids=text, sampling=SamplingParams.greedy(3), stop_ids=NEVER))
    engine.step()
    assert engine.stats().waiting == 1
    engine.cancel(first)
    got = []
    while engine.busy:
        got += [event.token_id for event in engine.step() if event.handle == second]
    assert got == naive(model, text, 3)
