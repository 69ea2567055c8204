"""AGIEval v1 (Zhong et al., arXiv:2304.06364); scored: its multiple-choice questions that have one answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from xverse.data.benchmarks.questions import (
    LETTERS,
    Options,
    Question,
    QuestionReader,
    RawQuestion,
    Subject,
    check_folder,
    first_ones_out,
    text_of,
)

NAME, FOLDERS = "agieval", ("agieval",)

# Title and language; without JEC-QA (several answers), the two cloze tasks, and the copy of SAT English
# without its passages.
TASKS = {
    "aqua-rat": ("algebra word problems", "en"),
    "gaokao-biology": ("高考生物", "zh"),
    "gaokao-chemistry": ("高考化学", "zh"),
    "gaokao-chinese": ("高考语文", "zh"),
    "gaokao-english": ("高考英语", "zh"),
    "gaokao-geography": ("高考地理", "zh"),
    "gaokao-history": ("高考历史", "zh"),
    "gaokao-mathqa": ("高考数学", "zh"),
    "gaokao-physics": ("高考物理", "zh"),
    "logiqa-en": ("logical reasoning", "en"),
    "logiqa-zh": ("逻辑推理", "zh"),
    "lsat-ar": ("LSAT analytical reasoning", "en"),
    "lsat-lr": ("LSAT logical reasoning", "en"),
    "lsat-rc": ("LSAT reading comprehension", "en"),
    "sat-en": ("SAT English", "en"),
    "sat-math": ("SAT mathematics", "en"),
}


def read(path: Path, name: str, reader: QuestionReader) -> Iterator[RawQuestion]:
    """Every question of a file; their ids begin with ``name``."""
    for number, (where, row) in enumerate(reader.objects(path)):
        options = row.get("options")
        valid = isinstance(options, list) and all(isinstance(option, str) for option in options)
        yield RawQuestion(
            id=f"{name}/{number}",
            where=where,
            text=text_of(row.get("question")),
            options=tuple(map(str, options or ())),
            passage=text_of(row.get("passage")),
            answer=row.get("label"),
            problem="" if valid else "options: expected a list of texts",
        )


def all_questions(data_dir: Path) -> Iterator[RawQuestion]:
    """Every question of every task, for decontamination."""
    for path in sorted((data_dir / "agieval").glob("data/v1/*.jsonl")):
        yield from read(path, path.stem, QuestionReader(skip=True))


def subjects(folder: Path, reader: QuestionReader, options: Options) -> list[Subject]:
    """The subjects to score."""
    check_folder(folder / "data" / "v1", NAME, "AGIEval")
    result = []
    for name, (title, language) in TASKS.items():
        shots, scored = first_ones_out(_questions(folder / "data" / "v1" / f"{name}.jsonl", name, reader))
        category = "English" if language == "en" else "Chinese"
        result.append(Subject(name=name, title=title, category=category, shots=shots, questions=scored))
    return result


def _questions(path: Path, name: str, reader: QuestionReader) -> list[Question]:
    raws = (raw for raw in read(path, name, reader) if raw.problem or len(text_of(raw.answer)) == 1)
    return reader.questions(replace(raw, options=tuple(_without_letters(raw.options))) for raw in raws)


def _without_letters(options: Sequence[str]) -> Iterator[str]:
    for letter, option in zip(LETTERS, options, strict=False):
        yield option.removeprefix(f"({letter})").strip()
