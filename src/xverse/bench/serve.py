"""``xverse bench serve``: the server under load, compared with the engine alone on similar prompts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from xverse import hardware
from xverse.bench.client import Stream, chat, completion, serving, together
from xverse.bench.options import add_quantize, add_rounds, add_threads, positive
from xverse.bench.report import Row, at_least, at_most, show
from xverse.config import UserError
from xverse.device import add_device
from xverse.log import notice
from xverse.values import add_model

if TYPE_CHECKING:
    from xverse.engine import Engine

OFFLINE_TARGET = (
    0.9  # of the engine's rate; not for small models, whose steps are as short as sending the tokens
)
PEER_TARGET = 2.5  # of llama.cpp's rate with the same number of sequences
SLOWEST_TARGET = 1 / 3  # of the median stream's rate
REPEAT_TARGET = 0.15  # of the uncached time to first token, for a prompt whose prefix is cached
IDLE_TARGET = 0.01  # of a core
GRAMMAR_TARGETS = {"small": 0.70, "large": 0.85}  # of the rate without a grammar
_SHARED = 1000
_SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string"}, "minItems": 10**6}},
    "required": ["names"],
}
Peer = Callable[[list[list[int]], int], float]


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_quantize(parser)
    add_device(parser)
    parser.add_argument("--clients", type=positive, default=8, metavar="N", help="concurrent streams")
    parser.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="prompt length")
    parser.add_argument("--new-tokens", type=positive, default=128, metavar="N", help="tokens per stream")
    add_rounds(parser, 3)
    add_threads(parser, "as xverse chat")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    model: str = "nano",
    quantize: str | None = None,
    *,
    clients: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    rounds: int = 3,
    threads: int | None = None,
    device: str = "auto",
    peer: Peer | None = None,
) -> dict[str, Any]:
    """Measure ``xverse serve`` with ``clients`` streaming clients. Medians over ``rounds``, in each of which
    the engine alone, the server and ``peer`` (prompts, new tokens → tokens/s) take turns.

    Raises UserError for an unknown model.
    """
    import torch

    from xverse.engine.load import ONE_THREAD_BELOW, load_engine
    from xverse.formats import ModelDirectory

    directory = ModelDirectory.named(model)
    small = directory.config.num_parameters() < ONE_THREAD_BELOW
    generator = torch.Generator().manual_seed(0)
    vocabulary = directory.tokenizer.vocab_size

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(300, vocabulary, (count, length), generator=generator).tolist()

    before = torch.get_num_threads()
    engine: Engine = load_engine(
        model, quantize=quantize, threads=threads, device=device, prefix_cache_bytes=0, max_batch=clients
    ).engine
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    errors = 0
    try:
        with serving(model, quantize, threads, ("--device", device)) as (port, process):
            together(port, [completion(prompts(1, prompt_tokens)[0], 4)])  # touches every weight once
            _offline(engine, prompts(clients, prompt_tokens), 4)
            for number in range(rounds):
                notice(f"serve {model}: round {number + 1} of {rounds}")
                note("offline", _offline(engine, prompts(clients, prompt_tokens), new_tokens))
                bodies = [completion(prompt, new_tokens) for prompt in prompts(clients, prompt_tokens)]
                streams = together(port, bodies)
                errors += sum(stream.error is not None for stream in streams)
                rates = [stream.rate for stream in streams]
                note("total", _total(streams))
                note("slowest", min(rates) / statistics.median(rates))
                note("first_token", statistics.median(stream.first for stream in streams))
                if peer is not None:
                    note("peer", peer(prompts(clients, prompt_tokens), new_tokens))
                (long,) = prompts(1, _SHARED)
                cached = [together(port, [completion(long + end, 2)])[0].first for end in prompts(4, 8)]
                note("shared_first", cached[0])
                note("shared_again", statistics.median(cached[1:]))
                (plain,) = together(port, [chat(new_tokens)])
                (formed,) = together(port, [chat(new_tokens, _SCHEMA)])
                note("plain", plain.rate)
                note("structured", formed.rate)
            used, seconds = _seconds(process.pid), 5.0
            time.sleep(seconds)
            idle = (_seconds(process.pid) - used) / seconds
    finally:
        torch.set_num_threads(before)

    def share(of: str, to: str) -> float:
        """The median of ratios within rounds, because the memory's speed changes between rounds."""
        return statistics.median(a / b for a, b in zip(figures[of], figures[to], strict=True))

    medians = {name: round(statistics.median(values), 4) for name, values in figures.items()}
    result: dict[str, Any] = {
        "bench": "serve",
        "model": model,
        "quantize": quantize,
        "clients": clients,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": {name: [round(value, 4) for value in values] for name, values in figures.items()},
        "offline_tok_s": medians["offline"],
        "total_tok_s": medians["total"],
        "offline_share": round(share("total", "offline"), 3),
        "slowest_of_median": round(min(figures["slowest"]), 3),
        "errors": errors,
        "first_token_s": medians["first_token"],
        "shared_first_s": medians["shared_first"],
        "shared_again_s": medians["shared_again"],
        "repeat_share": round(share("shared_again", "shared_first"), 4),
        "structured_share": round(share("structured", "plain"), 3),
        "idle_cpu_share": round(idle, 4),
    }
    if peer is not None:
        result |= {"peer_tok_s": medians["peer"], "peer_ratio": round(share("total", "peer"), 2)}
    show(f"serve {model}: {clients} streaming clients", _rows(result, small))
    return result


def _rows(result: dict[str, Any], small: bool) -> Iterator[Row]:
    share = result["offline_share"]
    bound = f"{share:.2f} × the engine alone ({result['offline_tok_s']:.1f} tok/s)"
    if not small:
        bound += "; " + at_least(OFFLINE_TARGET, share, "×")
    yield Row("all streams together", f"{result['total_tok_s']:.1f} tok/s", bound)
    if "peer_ratio" in result:
        text = f"{result['peer_ratio']:.2f} × the peer ({result['peer_tok_s']:.1f} tok/s)"
        yield Row("compared with the peer", text, at_least(PEER_TARGET, result["peer_ratio"], "×"))
    slowest = result["slowest_of_median"]
    bound = at_least(SLOWEST_TARGET, slowest, "of the median")
    yield Row("slowest stream", f"{slowest:.2f} of the median", bound)
    yield Row("errors", str(result["errors"]), at_most(0, result["errors"], "errors"))
    yield Row("time to the first token", f"{result['first_token_s']:.3f} s, median")
    text = f"{result['shared_first_s']:.3f} s, then {result['shared_again_s']:.3f} s"
    bound = at_most(REPEAT_TARGET, result["repeat_share"], "of the first")
    yield Row(f"behind {_SHARED} shared tokens", text, bound)
    structured_share = result["structured_share"]
    bound = at_least(GRAMMAR_TARGETS["small" if small else "large"], structured_share, "")
    yield Row("with a JSON schema", f"{structured_share:.0%} of the rate", bound)
    idle = result["idle_cpu_share"]
    yield Row("idle", f"{idle:.2%} of a core", at_most(IDLE_TARGET, idle, ""))


def _seconds(pid: int) -> float:
    return hardware.process_seconds(pid) or 0.0


def _total(streams: list[Stream]) -> float:
    """Tokens per second while all streams decode, from the latest first token to the earliest last one. This
    leaves out prefill, as does the figure for the engine alone."""
    begin = max(stream.begun + stream.first for stream in streams)
    end = min(stream.ended for stream in streams)
    if end <= begin:
        raise UserError("the streams did not overlap; use more --new-tokens")
    inside = sum(
        sum(begin < piece <= end for piece in stream.pieces) * stream.tokens / len(stream.pieces)
        for stream in streams
    )
    return inside / (end - begin)


def _offline(engine: Engine, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens per second of the engine decoding these prompts together, without a server."""
    from xverse.engine import Request, SamplingParams

    handles = {
        engine.submit(Request(prompt_ids=ids, sampling=SamplingParams.greedy(new_tokens), stop_ids=()))
        for ids in prompts
    }
    while handles:
        handles -= {event.handle for event in engine.step()}
    begin, tokens = time.perf_counter(), 0
    while engine.busy:
        tokens += len(engine.step())
    return tokens / (time.perf_counter() - begin)
