"""The benchmarks' files: one reader each, for scoring (``xverse eval``) and for decontamination."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from xverse.data.benchmarks import (
    agieval,
    ceval,
    commonsenseqa,
    gaokao_bench,
    gaokao_english,
    gsm8k,
    humaneval,
    mmlu,
)
from xverse.data.benchmarks.questions import RawQuestion


@dataclass(frozen=True)
class BenchmarkFiles:
    """Where a benchmark's files are below a data directory, and every question in them."""

    folders: tuple[str, ...]
    all_questions: Callable[[Path], Iterator[RawQuestion]]

    def present(self, data_dir: Path) -> bool:
        return any((data_dir / folder).is_dir() for folder in self.folders)


FILES = {
    module.NAME: BenchmarkFiles(module.FOLDERS, module.all_questions)
    for module in (mmlu, ceval, agieval, gaokao_bench, gaokao_english, gsm8k, humaneval, commonsenseqa)
}
