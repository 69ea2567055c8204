"""Bits per byte of plain text by language; unlike perplexity, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xverse.config import UserError
from xverse.engine import Engine
from xverse.eval.continuing import Continuations
from xverse.eval.generation import Outcome, TaskRun
from xverse.texts import load_texts

WINDOW = 1024  # tokens
_TEXTS = 200  # per language


def run(task: TaskRun) -> Outcome:
    folder = task.settings.texts or task.data_dir / "texts"
    paths = sorted(path for path in folder.glob("*") if path.name.endswith((".txt", ".jsonl", ".jsonl.gz")))
    if not paths:
        raise UserError(
            f"{folder}: no .txt, .jsonl or .jsonl.gz files; --texts names a folder with one for each language"
        )
    figures = {}
    rows = []
    for number, path in enumerate(paths):
        language = path.name.partition(".")[0]
        texts = load_texts(path)[: task.settings.limit or _TEXTS]
        nats, tokens, size = _measure(task.engine, texts)
        figures[language] = nats / math.log(2) / size
        rows.append(
            {
                "task": "ppl",
                "id": language,
                "bytes": size,
                "tokens": tokens,
                "bits_per_byte": figures[language],
                "perplexity": math.exp(nats / tokens),
            }
        )
        task.progress(number + 1, len(paths))
    figures = {"all languages, mean": sum(figures.values()) / len(figures), **figures}
    return Outcome(
        title="Bits per byte",
        method=f"of up to {_TEXTS} texts a language, in windows of {WINDOW} tokens that share nothing; the "
        "first token of a window is not counted, nor are its bytes; a window begins with the model's "
        "beginning of text if it has one",
        figures=figures,
        rows=rows,
    )


def _measure(engine: Engine | Continuations, texts: Sequence[str]) -> tuple[float, int, int]:
    """Negative log-probability in nats, tokens and bytes of the predicted text."""
    items = []
    size = tokens = 0
    first = list(engine.tokenizer.prefix_ids)
    length = min(WINDOW, engine.context_length - len(first))
    for ids in engine.tokenizer.encode_batch([text for text in texts if text]):
        for begin in range(0, len(ids), length):
            window = ids[begin : begin + length]
            if len(window) < 2:
                continue
            items.append(([*first, *window[:1]], [window[1:]]))
            tokens += len(window) - 1
            size += sum(len(engine.tokenizer.token_bytes(token)) for token in window[1:])
    if not items:
        raise UserError("a language has no text of two tokens or more")
    nats = -sum(sum(scores[0]) for scores in engine.score(items))
    return nats, tokens, size
