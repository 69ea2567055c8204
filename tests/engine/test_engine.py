from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.config import UserError
from xverse.engine import Engine, Event, Request, SamplingParams, Speculation
from xverse.engine.cache import position_bytes
from xverse.model.attention import FullCausal
from xverse.model.transformer import XverseForCausalLM

GREEDY = SamplingParams(temperature=0)
NEVER = (10**6,)  # a stop id that no token has


def with_context(model: XverseForCausalLM, positions: int) -> XverseForCausalLM:
    """The same weights with another ``max_position_embeddings``."""
    other = XverseForCausalLM(dataclasses.replace(model.config, max_position_embeddings=positions))
    other.load_state_dict(model.state_dict())
    return other


def collect(engine: Engine) -> dict[int, list[Event]]:
    events: dict[int, list[Event]] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.handle, []).append(event)
    return events


def tokens(events: list[Event]) -> list[int | None]:
    return [event.token_id for event in events]


def test_greedy_equals_full_recomputation(model: Any, tiny_tokenizer: Any, naive: Any) -> None:
    prompt = tiny_tokenizer.encode("你好，世界。 Hello, world!")
    engine = Engine(model, tiny_tokenizer, prefill_chunk=3)
    request = Request(prompt_ids=prompt, sampling=SamplingParams.greedy(40), stop_ids=NEVER)
    events = list(engine.stream(request))
    assert tokens(events) == naive(model, prompt, 40)
    assert [event.finish_reason for event in events] == [None] * 39 + ["length"]
    assert not engine.busy


def test_greedy_equals_transformers_llama(model: Any, tiny_tokenizer: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            rope_theta=config.rope_theta,
            tie_word_embeddings=False,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
    )
    llama.load_state_dict(model.state_dict())
    prompt = tiny_tokenizer.encode("A prompt for two implementations")
    for penalty in (1.0, 1.3):
        theirs = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=50,
            do_sample=False,
            repetition_penalty=penalty,
        )[0, len(prompt) :].tolist()
        sampling = SamplingParams.greedy(50, repetition_penalty=penalty)
        request = Request(prompt_ids=prompt, sampling=sampling)
        assert tokens(list(Engine(model, tiny_tokenizer).stream(request))) == theirs


# A few texts whose beginnings prompts share, of more than one block of 32 tokens.
TEXTS = [[(7 * n * n + 3 * n + 5 * text) % 240 + 4 for n in range(80)] for text in range(2)]
arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps before this request arrives
        st.tuples(st.sampled_from(TEXTS), st.integers(1, 70), st.lists(st.integers(4, 20), max_size=3)).map(
            lambda drawn: drawn[0][: drawn[1]] + drawn[2]
        ),  # its prompt
        st.integers(1, 40),  # max_new_tokens
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    arrivals=arrivals,
    max_batch=st.integers(1, 4),
    prefill_chunk=st.integers(1, 50),
    cache_tokens=st.sampled_from([None, 113]),  # 113: one longest request fits, two do not
    prefix_blocks=st.sampled_from([0, 2, 1000]),
    guess=st.booleans(),
)
def test_requests_together_equal_each_alone(
    model: Any,
    naive: Any,
    tiny_tokenizer: Any,
    arrivals: list[tuple[int, list[int], int]],
    max_batch: int,
    prefill_chunk: int,
    cache_tokens: int | None,
    prefix_blocks: int,
    guess: bool,
) -> None:
    # Hypothesis calls this many times with the same model, because the fixture runs only once.
    engine = Engine(
        model,
        tiny_tokenizer,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        max_cache_tokens=cache_tokens,
        prefix_cache_bytes=prefix_blocks * 32 * position_bytes(model.config, torch.float32),
        speculation=Speculation() if guess else None,
    )
    got: dict[int, list[int | None]] = {}
    wanted: dict[int, list[int]] = {}
    for wait, prompt, new_tokens in arrivals:
        for _ in range(wait):
            for event in engine.step():
                got[event.handle].append(event.token_id)
        request = Request(prompt_ids=prompt, sampling=SamplingParams.greedy(new_tokens), stop_ids=NEVER)
        handle = engine.submit(request)
        got[handle] = []
        wanted[handle] = naive(model, prompt, new_tokens)
    for handle, events in collect(engine).items():
        got[handle] += tokens(events)
    assert got == wanted
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.free_blocks + stats.cached_blocks == stats.blocks
    assert stats.cached_blocks == engine._prefixes.idle() <= prefix_blocks


def test_out_of_blocks_the_last_to_come_is_preempted_and_goes_on(
    model: Any, tiny_tokenizer: Any, naive: Any
) -> None:
    engine = Engine(model, tiny_tokenizer, max_batch=4, max_cache_tokens=128, prefix_cache_bytes=0)
    prompts = [[5 + n] * 20 for n in range(4)]
    sampling = [GREEDY, GREEDY, SamplingParams(seed=3), SamplingParams(seed=4, repetition_penalty=1.3)]
    requests = [
        Request(
            prompt_ids=prompt,
            sampling=dataclasses.replace(each, max_new_tokens=100),
            stop_ids=NEVER,
            logprobs=0,
        )
        for prompt, each in zip(prompts, sampling, strict=True)
    ]
    handles = [engine.submit(request) for request in requests]
    events = collect(engine)  # 8 blocks for 4 requests of 4 blocks
    assert engine.stats().preemptions > 0
    for handle, request, prompt in zip(handles, requests, prompts, strict=True):
        alone = list(Engine(model, tiny_tokenizer).stream(request))
        assert tokens(events[handle]) == tokens(alone)
        if request.sampling == GREEDY:
            assert tokens(alone) == naive(model, prompt, 100)
        for one, other in zip(events[handle], alone, strict=True):
            assert one.logprob is not None
            assert other.logprob is not None
            assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)


def test_text_deltas_joined_are_the_decoded_tokens(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model, tiny_tokenizer)
    for seed in range(4):
        request = Request(
            prompt_ids=[10], sampling=SamplingParams(max_new_tokens=60, seed=seed), stop_ids=NEVER
        )
        events = list(engine.stream(request))
        ids = [event.token_id for event in events if event.token_id is not None]
        assert "".join(event.text for event in events) == tiny_tokenizer.decode(ids)


def test_logprobs_are_those_of_the_model(model: Any, tiny_tokenizer: Any) -> None:
    prompt = tiny_tokenizer.encode("Logarithms")
    sampling = SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.2, seed=3, max_new_tokens=10)
    events = list(
        Engine(model, tiny_tokenizer).stream(
            Request(prompt_ids=prompt, sampling=sampling, stop_ids=NEVER, logprobs=3)
        )
    )
    ids = prompt + [event.token_id for event in events]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids]), FullCausal(1, len(ids)))[0].log_softmax(-1)  # [T, V]
    for at, event in enumerate(events, start=len(prompt) - 1):
        assert event.logprob is not None
        assert event.logprob.token_id == event.token_id
        assert event.logprob.logprob == pytest.approx(float(logprobs[at, event.token_id]), abs=1e-4)
        best = logprobs[at].topk(3)
        assert [token for token, _ in event.logprob.top] == best.indices.tolist()
        assert [value for _, value in event.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_no_logprobs_unless_asked(model: Any, tiny_tokenizer: Any) -> None:
    (event,) = Engine(model, tiny_tokenizer).stream(
        Request(prompt_ids=[5], sampling=SamplingParams(max_new_tokens=1))
    )
    assert event.logprob is None
    assert event.prompt_logprobs is None


def test_seed_decides_and_requests_do_not_disturb_each_other(model: Any, tiny_tokenizer: Any) -> None:
    def request(seed: int) -> Request:
        return Request(
            prompt_ids=[20, 21], sampling=SamplingParams(max_new_tokens=15, seed=seed), stop_ids=NEVER
        )

    engine = Engine(model, tiny_tokenizer)
    alone = [tokens(list(engine.stream(request(seed)))) for seed in (1, 2, 3)]
    assert alone[0] != alone[1]
    handles = [engine.submit(request(seed)) for seed in (1, 2, 3)]
    events = collect(engine)
    assert [tokens(events[handle]) for handle in handles] == alone


def test_stop_ids_and_strings(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model, tiny_tokenizer)
    prompt = tiny_tokenizer.encode("Where does it stop?")
    free = list(engine.stream(Request(prompt_ids=prompt, sampling=SamplingParams.greedy(40), stop_ids=NEVER)))
    ids, text = tokens(free), "".join(event.text for event in free)
    stop_id = ids[5]
    events = list(engine.stream(Request(prompt_ids=prompt, sampling=GREEDY, stop_ids=(3, stop_id))))
    assert tokens(events) == ids[: ids.index(stop_id) + 1]
    assert events[-1].finish_reason == "stop"
    assert "".join(event.text for event in events) == tiny_tokenizer.decode(ids[: ids.index(stop_id)])

    stop = text[8:12]
    events = list(
        engine.stream(
            Request(prompt_ids=prompt, sampling=SamplingParams.greedy(40, stop=(stop,)), stop_ids=NEVER)
        )
    )
    assert events[-1].finish_reason == "stop"
    assert "".join(event.text for event in events) == text[: text.index(stop)]

    held = text[-1] + "never comes"  # held back until the end, then returned
    events = list(
        engine.stream(
            Request(prompt_ids=prompt, sampling=SamplingParams.greedy(40, stop=(held,)), stop_ids=NEVER)
        )
    )
    assert events[-1].finish_reason == "length"
    assert "".join(event.text for event in events) == text


def test_the_context_ends_a_reply(model: Any, tiny_tokenizer: Any, naive: Any) -> None:
    engine = Engine(with_context(model, 300), tiny_tokenizer)
    prompt = [7] * 30
    request = Request(prompt_ids=prompt, sampling=SamplingParams.greedy(1000), stop_ids=NEVER)
    events = list(engine.stream(request))
    assert len(events) == 270
    assert events[-1].finish_reason == "length"
    assert tokens(events) == naive(model, prompt, 270)
    (event,) = engine.stream(Request(prompt_ids=[7] * 299, sampling=GREEDY, stop_ids=NEVER))
    assert event.finish_reason == "length"
    with pytest.raises(UserError, match="300 tokens leave no room"):
        engine.submit(Request(prompt_ids=[7] * 300))


def test_nan_logits_fail_only_their_request(model: Any, tiny_tokenizer: Any, naive: Any) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    engine = Engine(model, tiny_tokenizer)
    healthy = engine.submit(Request(prompt_ids=[5, 6], sampling=SamplingParams.greedy(8), stop_ids=NEVER))
    poisoned = engine.submit(Request(prompt_ids=[5, 9], sampling=SamplingParams.greedy(8), stop_ids=NEVER))
    events = collect(engine)
    assert tokens(events[healthy]) == naive(model, [5, 6], 8)
    (failure,) = events[poisoned]
    assert failure.finish_reason == "error"
    assert failure.error is not None
    assert "not finite" in failure.error
    assert failure.token_id is None


def test_cancel_and_interleaved_streams(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model, tiny_tokenizer)
    request = Request(prompt_ids=[30, 31], sampling=SamplingParams.greedy(10), stop_ids=NEVER)
    handle = engine.submit(request)
    engine.step()
    assert engine.cancel(handle)
    assert not engine.cancel(handle)
    assert not engine.busy

    first, second = engine.stream(request), engine.stream(request)
    next(first), next(second)
    second.close()  # as a client that disconnects
    assert [event.finish_reason for event in first] == [None] * 8 + ["length"]
    assert not engine.busy


def test_ids_beyond_the_tokenizer_are_never_chosen(model: Any, tiny_tokenizer: Any, naive: Any) -> None:
    """Some exports pad the vocabulary; the extra rows of the head are not tokens."""
    vocab = model.config.vocab_size
    padded = XverseForCausalLM(dataclasses.replace(model.config, vocab_size=vocab + 30))
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat((state[name], torch.full((30, model.config.hidden_size), 9.0)))
    padded.load_state_dict(state)
    request = Request(prompt_ids=[8, 9], sampling=SamplingParams.greedy(20), stop_ids=NEVER)
    assert tokens(list(Engine(padded, tiny_tokenizer).stream(request))) == naive(model, [8, 9], 20)
    with pytest.raises(UserError, match="prompt_ids"):
        Engine(padded, tiny_tokenizer).submit(Request(prompt_ids=[vocab]))


def test_what_cannot_run_is_refused(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model, tiny_tokenizer, max_cache_tokens=100)
    with pytest.raises(UserError, match="max_new_tokens"):
        engine.submit(Request(prompt_ids=[5], sampling=SamplingParams(max_new_tokens=100)))
    with pytest.raises(UserError, match="prompt_ids"):
        engine.submit(Request(prompt_ids=[-1]))
    with pytest.raises(UserError, match="max_batch"):
        Engine(model, tiny_tokenizer, max_batch=0)
    small = XverseForCausalLM(dataclasses.replace(model.config, vocab_size=50))
    with pytest.raises(UserError, match="use the tokenizer of the model"):
        Engine(small, tiny_tokenizer)


def test_bfloat16_runs_in_its_own_type(model: Any, tiny_tokenizer: Any) -> None:
    engine = Engine(model.to(torch.bfloat16), tiny_tokenizer)
    request = Request(prompt_ids=[5, 6, 7], sampling=SamplingParams.greedy(5), stop_ids=NEVER)
    assert len(list(engine.stream(request))) == 5
