"""Random traffic together and each request alone, compared bit by bit; and what batch invariance costs."""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

from xverse import values
from xverse.bench.options import add_quantize, add_threads
from xverse.engine import Engine, Request, SamplingParams, Speculation
from xverse.engine.load import load_engine
from xverse.log import notice

# What is compared of a reply: its tokens, and log-probabilities of the 20 most probable ones at each position
# of prompt and reply, which no change of a logit leaves as they are.
Outcome = tuple[Any, ...]
# Requests that run at the same time, so that an interrupted run has compared what it reports.
GROUP = 250


def traffic(
    vocab_size: int, count: int, seed: int, longest: int = 400, longest_reply: int = 60
) -> list[Request]:
    """Requests of any kind: greedy and drawn, with common beginnings, repetitions, scores and embeddings."""
    rng = random.Random(seed)
    ids = range(4, vocab_size)
    beginnings = [rng.choices(ids, k=rng.randrange(20, longest // 2)) for _ in range(4)]
    requests = []
    for _ in range(count):
        own = rng.choices(ids, k=rng.randrange(1, longest // 2))
        if rng.random() < 0.3:  # for n-gram speculation
            own = own[:6] * 4
        prompt = (rng.choice(beginnings) if rng.random() < 0.6 else []) + own
        kind = rng.random()
        if kind < 0.1:
            pooling: Any = rng.choice(("mean", "last"))
            requests.append(Request(prompt_ids=prompt, pooling=pooling, generate=False))
            continue
        if kind < 0.2:
            requests.append(Request(prompt_ids=prompt, prompt_logprobs=20, generate=False))
            continue
        sampling = SamplingParams.greedy(rng.randrange(1, longest_reply))
        if kind > 0.6:
            sampling = dataclasses.replace(sampling, temperature=1.0, top_p=0.9, seed=rng.randrange(2**31))
        requests.append(
            Request(
                prompt_ids=prompt, sampling=sampling, logprobs=20, prompt_logprobs=20 if kind < 0.3 else None
            )
        )
    return requests


def _outcome(events: Sequence[Any]) -> Outcome:
    tokens = [(event.token_id, event.logprob, event.finish_reason, event.error) for event in events]
    return (*tokens, events[0].prompt_logprobs, events[0].embedding)


def run_alone(engine: Engine, requests: Sequence[Request]) -> list[Outcome]:
    """Each request by itself; the engine has no prefix cache."""
    return [_outcome([*engine.stream(request)]) for request in requests]


def run_together(engine: Engine, requests: Sequence[Request], seed: int) -> list[Outcome]:
    """All requests, arriving at random times; some are asked for twice and cancelled once."""
    rng = random.Random(seed)
    waiting = [*range(len(requests))]
    rng.shuffle(waiting)
    index_of: dict[int, int] = {}
    events: dict[int, list[Any]] = {index: [] for index in waiting}
    cancelled: list[int] = []
    while waiting or engine.busy:
        while waiting and rng.random() < 0.6:
            index = waiting.pop()
            index_of[engine.submit(requests[index])] = index
            if rng.random() < 0.1:
                cancelled.append(engine.submit(requests[rng.randrange(len(requests))]))
        if cancelled and rng.random() < 0.2:
            engine.cancel(cancelled.pop())
        for event in engine.step():
            if event.handle in index_of:
                events[index_of[event.handle]].append(event)
    return [_outcome(events[index]) for index in range(len(requests))]


def arguments(parser: argparse.ArgumentParser) -> None:
    values.add_model(parser)
    add_quantize(parser)
    add = values.flags(parser)
    add("--requests", "requests to compare", type=values.whole(1), default=2000, metavar="N")
    add("--seed", "seed of the traffic", type=values.whole(), default=0, metavar="N")
    add_threads(parser, "as xverse chat")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Differences, and processor seconds with and without batch invariance for the same traffic."""
    import torch

    engine = load_engine(
        args.model, quantize=args.quantize, prefix_cache_bytes=0, batch_invariant=True
    ).engine
    requests = traffic(engine.tokenizer.vocab_size, args.requests, args.seed)
    crowded = Engine(
        engine.model, engine.tokenizer, max_batch=32, max_cache_tokens=2048, prefill_chunk=256,
        speculation=Speculation(), batch_invariant=True,
    )  # fmt: skip
    differences, threads = 0, torch.get_num_threads()
    for start in range(0, len(requests), GROUP):
        group = requests[start : start + GROUP]
        alone = run_alone(engine, group)
        torch.set_num_threads(args.threads or threads)
        together = run_together(crowded, group, args.seed + 1 + start)
        torch.set_num_threads(threads)
        differences += sum(one != other for one, other in zip(alone, together, strict=True))
        notice(f"{start + len(group):,} of {len(requests):,} requests compared: {differences} differences")
    stats = crowded.stats()
    seconds: dict[bool, float] = {}
    for batch_invariant in (True, False, True, False):
        timed = Engine(
            engine.model,
            engine.tokenizer,
            max_batch=32,
            max_cache_tokens=16_384,
            batch_invariant=batch_invariant,
        )
        begin = time.process_time()
        run_together(timed, requests[:500], args.seed + 1)
        spent = time.process_time() - begin
        seconds[batch_invariant] = min(spent, seconds.get(batch_invariant, spent))
    return {
        "requests": len(requests),
        "differences": differences,
        "preemptions": stats.preemptions,
        "reused_tokens": stats.reused_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "seconds_invariant": round(seconds[True], 2),
        "seconds_otherwise": round(seconds[False], 2),
        "price": round(seconds[True] / seconds[False] - 1, 4),
    }
