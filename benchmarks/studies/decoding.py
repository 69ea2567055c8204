"""Parts of ``xverse bench infer``: speculation with forced replies, its acceptance rate with real ones, and
the share of a step spent in scheduler and sampling."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from xverse.bench.infer_speed import default_threads, load_named
from xverse.bench.options import add_quantize, add_shape, add_threads
from xverse.bench.report import Row, at_least, at_most, count_threads, show
from xverse.config import UserError
from xverse.engine import Engine, Request, SamplingParams, Speculation
from xverse.engine.sampling_params import CHAT
from xverse.formats import load_model, load_tokenizer, resolve
from xverse.hardware import using_threads
from xverse.kernels.linear import weights_kind
from xverse.log import notice
from xverse.model import XverseForCausalLM
from xverse.quant.text import parity_tokens
from xverse.tokenizer import Tokenizer
from xverse.values import add_model

QUOTING_TARGET, OTHER_TARGET = 2.5, 0.95  # × plain decoding
OVERHEAD_TARGET = 0.10
_PROMPT, _TARGET, _QUOTE = 480, 96, 24
_GREEDY = SamplingParams(temperature=0)
_CHAT = dataclasses.replace(CHAT, seed=0)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        choices=["speculation", "scheduler"],
        default="speculation",
        help="speculation: with forced replies for a shape, real ones for a model; scheduler: the share of a "
        "step of 64 sequences spent outside the model",
    )
    source = parser.add_mutually_exclusive_group()
    add_model(source)
    add_shape(source)
    add_quantize(parser)
    parser.add_argument("--draft", metavar="M", help="draft model for --part speculation")
    add_threads(parser, "as xverse chat")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError for an unknown model or shape, too little memory, and an unused draft."""
    if args.draft is not None and (args.part != "speculation" or args.shape is not None):
        raise UserError("--draft needs --part speculation and a --model with real weights")
    model, tokenizer = load_named(args.model, args.shape, quantize=args.quantize)
    threads = args.threads or default_threads(model.config)
    name = args.shape or args.model
    if args.part == "scheduler":
        return scheduler(model, tokenizer, name, threads=threads)
    if args.shape is not None:
        return speculation(model, tokenizer, name, threads=threads)
    draft = None
    if args.draft is not None:
        where = resolve(args.draft)
        draft = load_model(where, model.model.norm.weight.dtype), load_tokenizer(where)
    return acceptance(model, tokenizer, name, draft, threads=threads)


class Forced:
    """A constraint that allows one text only: the model computes as usual, and its reply is known."""

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self._left = list(reversed(tokens))
        self._vocab_size = vocab_size

    def allowed(self) -> Tensor:
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
        allowed[self._left[-1]] = True
        return allowed

    def accept(self, token_id: int) -> None:
        assert self._left.pop() == token_id

    def forced(self) -> list[int]:
        return []  # every token costs a step, as if the model had chosen it


def texts(vocab_size: int) -> tuple[list[int], dict[str, list[int]]]:
    """A prompt and two replies: one quotes the prompt, the other continues with different text.

    The text is real (the package's passages in thirteen languages), with chance repetitions as frequent as
    usual. Its ids come from the embedded model's tokenizer, mapped into ``vocab_size``.
    """
    tokenizer = load_tokenizer(resolve("nano"))
    ids = [token % (vocab_size - 4) + 4 for token in parity_tokens(tokenizer, 0).flatten().tolist()]
    prompt, other = ids[:_PROMPT], ids[_PROMPT : _PROMPT + _TARGET]
    quoting: list[int] = []
    for place in range(40, _PROMPT, 110):  # four passages, each after a word of other text
        quoting += [other[place % _TARGET], *prompt[place : place + _QUOTE]]
    return prompt, {"quoting": quoting[:_TARGET], "other": other}


def speculation(
    model: XverseForCausalLM, tokenizer: Tokenizer, name: str, *, threads: int, rounds: int = 3
) -> dict[str, Any]:
    """Decoding speed with prompt lookup compared with plain decoding, with forced replies."""
    prompt, replies = texts(tokenizer.vocab_size)
    size = len(prompt) + _TARGET + 64
    lengths = f"{len(prompt)} + {_TARGET} tokens"
    notice(f"speculation {name}: {rounds} rounds of {lengths}, {count_threads(threads)}")
    with using_threads(threads):
        engines = {
            kind: Engine(model, tokenizer, max_batch=1, max_cache_tokens=size, speculation=choice)
            for kind, choice in (("plain", None), ("lookup", Speculation()))
        }
        rates: dict[str, dict[str, list[float]]] = {text: {kind: [] for kind in engines} for text in replies}
        for number in range(rounds + 1):
            for text, reply in replies.items():
                for kind, engine in engines.items():
                    seconds, _ = _generate(
                        engine, prompt, len(reply), _GREEDY, Forced(reply, tokenizer.vocab_size)
                    )
                    if number:  # the first round prefills and touches every weight once
                        rates[text][kind].append((len(reply) - 1) / seconds)
    stats = engines["lookup"].stats()
    result: dict[str, Any] = {
        "bench": "infer",
        "part": "speculation",
        "model": name,
        "weights": weights_kind(model),
        "threads": threads,
        "prompt_tokens": len(prompt),
        "new_tokens": _TARGET,
        "rounds": rounds,
        "proposed_tokens": stats.proposed_tokens,
        "accepted_tokens": stats.accepted_tokens,
    }
    for text, kinds in rates.items():
        result[text] = {
            **{f"{kind}_tok_s": round(statistics.median(values), 2) for kind, values in kinds.items()},
            "ratio": round(statistics.median(_ratios(kinds["lookup"], kinds["plain"])), 3),
            "ratios": [round(ratio, 3) for ratio in _ratios(kinds["lookup"], kinds["plain"])],
        }
    show(
        f"speculation {name}: {result['weights']}, {count_threads(threads)}, forced replies", _forced(result)
    )
    return result


def _forced(result: dict[str, Any]) -> Iterator[Row]:
    for text, title, target in (
        ("quoting", "a reply that quotes its prompt", QUOTING_TARGET),
        ("other", "a reply that does not", OTHER_TARGET),
    ):
        figures = result[text]
        rates = (
            f"{figures['plain_tok_s']:.2f} → {figures['lookup_tok_s']:.2f} tok/s, {figures['ratio']:.2f} ×"
        )
        yield Row(title, rates, at_least(target, figures["ratio"], "×"))


def acceptance(
    model: XverseForCausalLM,
    tokenizer: Tokenizer,
    name: str,
    draft: tuple[XverseForCausalLM, Tokenizer] | None,
    *,
    threads: int,
    rounds: int = 3,
) -> dict[str, Any]:
    """Speed and acceptance rate with greedy replies of 64 tokens to eight prompts of 48."""
    ids = parity_tokens(tokenizer, 0).flatten().tolist()
    prompts = [ids[start : start + 48] for start in range(0, 8 * 96, 96)]
    kinds: dict[str, Speculation | None] = {"plain": None, "lookup": Speculation()}
    if draft is not None:
        kinds["draft"] = Speculation(draft=draft[0], draft_tokenizer=draft[1])
    notice(f"acceptance {name}: {rounds} rounds of {len(prompts)} × 64 tokens, {count_threads(threads)}")
    outputs: dict[str, list[list[int]]] = {kind: [] for kind in kinds}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    with using_threads(threads):
        engines = {
            kind: Engine(model, tokenizer, max_batch=1, max_cache_tokens=256, speculation=choice)
            for kind, choice in kinds.items()
        }
        for number in range(rounds + 1):
            for kind, engine in engines.items():
                replies = [_generate(engine, prompt, 64, _GREEDY) for prompt in prompts]
                if number:
                    rates[kind].append(63 * len(prompts) / sum(seconds for seconds, _ in replies))
                outputs[kind] = [tokens for _, tokens in replies]
    result: dict[str, Any] = {"bench": "infer", "part": "speculation", "model": name, "threads": threads}
    rows = []
    for kind, engine in engines.items():
        stats = engine.stats()
        same = sum(one == other for one, other in zip(outputs[kind], outputs["plain"], strict=True))
        figures = {
            "tok_s": round(statistics.median(rates[kind]), 1),
            "ratio": round(statistics.median(_ratios(rates[kind], rates["plain"])), 3),
            "proposed_tokens": stats.proposed_tokens,
            "accepted_tokens": stats.accepted_tokens,
            "same_replies": same,
        }
        result[kind] = figures
        text = f"{figures['tok_s']:.1f} tok/s, {figures['ratio']:.2f} × plain"
        if stats.proposed_tokens:
            text += f", {stats.accepted_tokens / stats.proposed_tokens:.0%} of the drafts accepted"
        rows.append(Row(kind, text, f"{same} of {len(prompts)} replies unchanged"))
    show(f"speculation {name}: real greedy replies, {count_threads(threads)}", rows)
    return result


def scheduler(
    model: XverseForCausalLM, tokenizer: Tokenizer, name: str, *, batch: int = 64, threads: int = 1
) -> dict[str, Any]:
    """The share of a decoding step of ``batch`` sequences that is spent outside the model."""
    steps = 60
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, tokenizer.vocab_size, (batch, 32), generator=generator).tolist()
    result: dict[str, Any] = {"bench": "infer", "part": "scheduler", "model": name, "batch": batch}
    result["threads"] = threads
    rows = []
    with using_threads(threads):
        for kind, sampling in (("greedy", _GREEDY), ("chat", _CHAT)):
            engine = Engine(model, tokenizer, max_batch=batch, max_cache_tokens=batch * 256)
            inside = _timed(engine)
            for prompt in prompts:
                engine.submit(
                    Request(
                        prompt_ids=prompt,
                        sampling=dataclasses.replace(sampling, max_new_tokens=steps * 4),
                        stop_ids=(),
                    )
                )
            while engine.stats().running < batch:
                engine.step()
            for _ in range(10):
                engine.step()
            shares, durations = [], []
            for _ in range(steps):
                inside.clear()
                begin = time.perf_counter()
                assert len(engine.step()) == batch
                durations.append(time.perf_counter() - begin)
                shares.append(1 - sum(inside) / durations[-1])
            share, step = statistics.median(shares), statistics.median(durations)
            result[kind] = {"outside_share": round(share, 4), "step_ms": round(step * 1e3, 3)}
            bound = at_most(OVERHEAD_TARGET, round(share, 4), "of the step") if kind == "greedy" else ""
            rows.append(Row(f"{kind} sampling", f"{share:.1%} of {step * 1e3:.2f} ms", bound))
    show(f"outside the model: {name}, {batch} sequences, {count_threads(threads)}", rows)
    return result


def _timed(engine: Engine) -> list[float]:
    """A list that receives the seconds of each call of the engine into its model."""
    seconds: list[float] = []

    def wrapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            begin = time.perf_counter()
            output = function(*arguments)
            seconds.append(time.perf_counter() - begin)
            return output

        return call

    for name in ("_hidden", "_logits"):
        setattr(engine, name, wrapped(getattr(engine, name)))
    return seconds


def _generate(
    engine: Engine,
    prompt: list[int],
    new_tokens: int,
    sampling: SamplingParams,
    constraint: Forced | None = None,
) -> tuple[float, list[int]]:
    """Seconds from the first token to the last, and the tokens."""
    request = Request(
        prompt_ids=prompt,
        sampling=dataclasses.replace(sampling, max_new_tokens=new_tokens),
        stop_ids=(),
        constraint=constraint,
    )
    begin = 0.0
    tokens: list[int] = []
    for event in engine.stream(request):
        if event.token_id is None:
            raise UserError(event.error or "the request ended early")
        if not tokens:
            begin = time.perf_counter()
        tokens.append(event.token_id)
    return time.perf_counter() - begin, tokens


def _ratios(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(some, others, strict=True)]
