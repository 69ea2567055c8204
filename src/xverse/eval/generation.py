"""Generating replies to many prompts at once, and what a generative task is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.engine import Engine, Request, SamplingParams
from xverse.eval.continuing import Continuations


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """``limit``: at most so many items of each kind; ``allow_code``: generated code may be run."""

    limit: int | None = None
    allow_code: bool = False
    texts: Path | None = None  # folder of texts for ppl


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``figures``: for the report's table; ``rows``: one for each item; ``page``: Markdown or empty."""

    title: str
    method: str
    figures: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    page: str = ""


@dataclass(frozen=True)
class TaskRun:
    """What a task gets. ``progress(done, total)`` is called after each item."""

    engine: Engine | Continuations
    stop_ids: Sequence[int]
    data_dir: Path
    settings: TaskSettings
    progress: Callable[[int, int], None]


Task = Callable[[TaskRun], Outcome]


def encode_prompts(engine: Engine | Continuations, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts to continue, with what begins a text of the model."""
    first = engine.tokenizer.prefix_ids
    return [[*first, *ids] for ids in engine.tokenizer.encode_batch(texts)]


def generate(
    engine: Engine | Continuations,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    stop: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, str]]:
    """The greedy continuation of every prompt up to, and without, a stop string or stop id, and why it ended:
    "stop", or "length" if it was cut off.

    Raises UserError for a prompt that leaves no room for a reply.
    """
    if isinstance(engine, Continuations):
        return engine.replies(
            prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, stop=stop, progress=progress
        )
    texts = ["" for _ in prompts]
    reasons = ["" for _ in prompts]
    room = engine.context_length
    handles = {}
    for index, ids in enumerate(prompts):
        request = Request(
            prompt_ids=ids,
            sampling=SamplingParams.greedy(max(1, min(max_new_tokens, room - len(ids))), stop=tuple(stop)),
            stop_ids=tuple(stop_ids),
        )
        handles[engine.submit(request)] = index
    done = 0
    while handles:
        for event in engine.step():
            index = handles[event.handle]
            texts[index] += event.text
            if event.finish_reason is not None:
                assert event.error is None, event.error
                reasons[index] = event.finish_reason
                del handles[event.handle]
                done += 1
                if progress is not None:
                    progress(done, len(prompts))
    return list(zip(texts, reasons, strict=True))
