"""The texts of the evaluation sets, for finding them in training data: questions, options, passages.

Each reader takes a benchmark's folder as its publisher lays it out (``xverse eval fetch``).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.data.benchmarks.gaokao import parts
from xverse.data.benchmarks.questions import Reader, json_file


@dataclass(frozen=True)
class Item:
    """One question as it is asked: its text, its options, and the passage before it."""

    id: str
    text: str
    options: tuple[str, ...] = ()
    passage: str = ""


def _mmlu(folder: Path) -> Iterator[Item]:
    for path in sorted(folder.glob("data/*/*.csv")):
        for number, (_, row) in enumerate(Reader(skip=True).rows(path, None)):
            if len(row) >= 5:
                yield Item(f"{path.stem}/{number}", row[0], tuple(row[1:5]))


def _ceval(folder: Path) -> Iterator[Item]:
    for path in sorted(folder.glob("*/*.csv")):
        for _, row in Reader(skip=True).rows(path, ("id", "question", "A", "B", "C", "D")):
            if len(row) >= 6:
                yield Item(f"{path.stem}/{row[0]}", row[1], tuple(row[2:6]))


def _agieval(folder: Path) -> Iterator[Item]:
    for path in sorted(folder.glob("data/v1/*.jsonl")):
        for number, (_, row) in enumerate(Reader(skip=True).objects(path)):
            options = tuple(str(option) for option in row.get("options") or ())
            yield Item(
                f"{path.stem}/{number}",
                str(row.get("question") or ""),
                options,
                str(row.get("passage") or ""),
            )


def _gaokao_bench(folder: Path) -> Iterator[Item]:
    paths = [*folder.glob("Data/Objective_Questions/*.json"), *folder.glob("updates/Data/*/*.json")]
    for path in sorted(paths):
        for number, row in enumerate(json_file(path).get("example", ())):
            yield from _gaokao(f"{path.stem}/{number}", str(row.get("question") or ""), row.get("answer"))


def _gaokao_english(folder: Path) -> Iterator[Item]:
    for path in sorted(folder.glob("*.jsonl")):
        for number, (_, row) in enumerate(Reader(skip=True).objects(path)):
            answer = row.get("answer", row.get("answers"))
            yield from _gaokao(f"{path.stem}/{number}", str(row.get("question") or ""), answer)


def _gaokao(name: str, text: str, answer: Any) -> Iterator[Item]:
    count = len(answer) if isinstance(answer, list) and answer else 1
    for number, part in enumerate(parts(text, count)):
        yield Item(f"{name}/{number}", part.text, part.options, part.shared)


def _jsonl(text: str, options: Callable[[dict[str, Any]], tuple[str, ...]] = lambda row: ()) -> Any:
    def read(folder: Path) -> Iterator[Item]:
        for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
            opener: Any = gzip.open if path.name.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file):
                    row = json.loads(line)
                    yield Item(f"{path.name.split('.')[0]}/{number}", str(row.get(text) or ""), options(row))

    return read


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "mmlu": _mmlu,
    "ceval": _ceval,
    "agieval": _agieval,
    "gaokao-bench": _gaokao_bench,
    "gaokao-english": _gaokao_english,
    "gsm8k": _jsonl("question"),
    "humaneval": _jsonl("prompt"),
    "commonsenseqa": _jsonl("question", lambda row: tuple(row["choices"]["text"])),
}
