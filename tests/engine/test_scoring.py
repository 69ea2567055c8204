"""Log-probabilities of prompts and of given continuations, against a plain forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xverse.config import UserError
from xverse.engine import Engine, Request, SamplingParams
from xverse.model.attention import FullCausal

GREEDY = SamplingParams(temperature=0)


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V]; row t is about token t + 1."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), FullCausal(1, len(ids)))[0].log_softmax(-1)


def expected(model: Any, prompt: list[int], continuation: list[int]) -> list[float]:
    found = logprobs(model, prompt + continuation)
    return [float(found[len(prompt) + at - 1, token]) for at, token in enumerate(continuation)]


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk": 7}, {"max_batch": 2, "max_cache_tokens": 160}])
def test_continuations_have_the_models_logprobs(
    model: Any, tiny_tokenizer: Any, settings: dict[str, int]
) -> None:
    shared = [(7 * n) % 200 + 4 for n in range(70)]
    items = [
        (shared, [[5], [6], [7], [8]]),
        ([*shared, 9, 9], [[5, 6, 7], [5, 6, 8], [30]]),
        (shared[:64], [[9, 9]]),
        ([4], [[4, 5]]),
    ]
    engine = Engine(model, tiny_tokenizer, **settings)
    done: list[int] = []
    results = engine.score(items, done.append)
    assert done == [1, 2, 3, 4]
    for (prompt, continuations), result in zip(items, results, strict=True):
        for continuation, found in zip(continuations, result, strict=True):
            assert found == pytest.approx(expected(model, prompt, continuation), abs=1e-4)
    assert not engine.busy
    # Continuations that differ only in the last token share a pass: those of the first item, "5 6", "30".
    assert engine._next_handle == 5


def test_scoring_beside_generation(model: Any, tiny_tokenizer: Any, naive: Any) -> None:
    engine = Engine(model, tiny_tokenizer)
    handle = engine.submit(Request(prompt_ids=[9, 8], sampling=SamplingParams.greedy(5), stop_ids=()))
    ((result,),) = engine.score([([5, 6], [[7, 8]])])
    assert result == pytest.approx(expected(model, [5, 6], [7, 8]), abs=1e-4)
    events = []
    while engine.busy:
        events += engine.step()
    assert [event.token_id for event in events] == naive(model, [9, 8], 5)
    assert {event.handle for event in events} == {handle}


def test_a_whole_context_can_be_scored(model: Any, tiny_tokenizer: Any) -> None:
    context = model.config.max_position_embeddings
    ids = [5 + n % 9 for n in range(context)]
    ((result,),) = Engine(model, tiny_tokenizer).score([(ids[:-2], [[7, 8, 9]])])
    assert len(result) == 3
    with pytest.raises(UserError, match="leave no room"):
        Engine(model, tiny_tokenizer).score([(ids, [[7, 8]])])


def test_wrong_items_are_named(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model, tiny_tokenizer)
    with pytest.raises(UserError, match="item 1: continuation 0 has no tokens"):
        engine.score([([5], [[6]]), ([5], [[]])])
    with pytest.raises(UserError, match="ids must be 0 to"):
        engine.score([([5], [[10**6]])])
    assert not engine.busy
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    with pytest.raises(UserError, match=r"item 1: .* not finite"):
        engine.score([([5], [[6]]), ([9], [[6]])])
    assert not engine.busy


@pytest.mark.parametrize("new_tokens", [0, 4])
@pytest.mark.parametrize("chunk", [6, 512])
def test_prompt_logprobs(model: Any, tiny_tokenizer: Any, new_tokens: int, chunk: int) -> None:
    prompt = [(5 * n) % 200 + 4 for n in range(45)]
    request = Request(
        prompt_ids=prompt,
        sampling=SamplingParams.greedy(max(new_tokens, 1)),
        generate=new_tokens > 0,
        stop_ids=(),
        prompt_logprobs=2,
    )
    engine = Engine(model, tiny_tokenizer, prefill_chunk=chunk)
    list(engine.stream(request))  # its blocks are in the prefix cache now, but must not be used
    first, *others = engine.stream(request)
    assert first.prompt_logprobs is not None
    assert all(event.prompt_logprobs is None for event in others)
    assert len(others) + 1 == max(new_tokens, 1)
    assert (first.token_id is None) == (new_tokens == 0)
    rows = logprobs(model, prompt)
    assert [found.token_id for found in first.prompt_logprobs] == prompt[1:]
    for row, found in zip(rows, first.prompt_logprobs, strict=False):
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert [token for token, _ in found.top] == row.topk(2).indices.tolist()


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk": 7}, {"max_batch": 2, "max_cache_tokens": 160}])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states(
    model: Any, tiny_tokenizer: Any, settings: dict[str, int], pooling: Any
) -> None:
    """Also with a prompt's beginning in the prefix cache, in chunks, and after preemption."""
    shared = [(7 * n) % 200 + 4 for n in range(70)]
    prompts = [shared, [*shared, 9, 9], [5], shared]
    engine = Engine(model, tiny_tokenizer, **settings)
    handles = {
        engine.submit(Request(prompt_ids=ids, pooling=pooling, generate=False)): ids for ids in prompts[1:]
    }
    handles[engine.submit(Request(prompt_ids=[6], sampling=SamplingParams.greedy(80), stop_ids=()))] = []
    found = {}
    while engine.busy:
        found |= {event.handle: event.embedding for event in engine.step() if event.embedding}
    results = [(handles[handle], embedding) for handle, embedding in found.items()]
    results += [(prompts[0], embedding) for embedding in engine.embed(prompts[:1], pooling)]
    assert len(results) == 4
    for ids, embedding in results:
        with torch.inference_mode():
            states = model.model(torch.tensor([ids]), FullCausal(1, len(ids)))[0]  # [T, D]
        pooled = states.mean(dim=0) if pooling == "mean" else states[-1]
        assert embedding == pytest.approx((pooled / pooled.norm()).tolist(), abs=1e-4)


def test_prompt_logprobs_of_a_part_reuse_the_beginning(model: Any, tiny_tokenizer: Any) -> None:
    shared = [(7 * n) % 200 + 4 for n in range(70)]
    engine = Engine(model, tiny_tokenizer)
    for end in ([5, 6, 7], [8, 9]):
        request = Request(prompt_ids=[*shared, *end], prompt_logprobs=0, prompt_start=70, generate=False)
        (event,) = engine.stream(request)
        assert event.prompt_logprobs is not None
        found = [token.logprob for token in event.prompt_logprobs]
        assert found == pytest.approx(expected(model, shared, end), abs=1e-4)
    assert engine.stats().reused_tokens == 64
