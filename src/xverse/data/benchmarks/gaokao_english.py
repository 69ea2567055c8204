"""GAOKAO-English: the multiple-choice questions of AI-Gaokao's ten English papers of 2018 to 2021 (Yuan and
Liu, arXiv:2206.11147), without listening. GAOKAO-Bench contains these papers; its copy is scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xverse.data.benchmarks.gaokao_bench import Rows, examples, objective, read, single_answer
from xverse.data.benchmarks.questions import Options, QuestionReader, RawQuestion, Subject, first_ones_out

NAME, FOLDERS = "gaokao-english", ("gaokao-english", "gaokao-bench")

# Kind, title, file of GAOKAO-Bench, the papers' places in it (the second one of 2018 is not among them).
KINDS = (
    (
        "reading-multiple-choice",
        "阅读理解",
        "2010-2022_English_Reading_Comp",
        (*range(72, 76), *range(80, 116)),
    ),
    ("reading-cloze", "七选五", "2012-2022_English_Cloze_Test", (13, *range(15, 24))),
    ("cloze-multiple-choice", "完形填空", "2010-2022_English_Fill_in_Blanks", (17, *range(19, 28))),
)


def _papers(folder: Path, file: str, places: tuple[int, ...]) -> Rows:
    rows = examples(objective(folder, file))
    return [rows[place] for place in places if place < len(rows)]


def all_questions(data_dir: Path) -> Iterator[RawQuestion]:
    """The questions in ``gaokao-english/``, and the scored ones that are not among them."""
    seen = set()
    for path in sorted((data_dir / "gaokao-english").glob("*.jsonl")):
        for raw in read(QuestionReader(skip=True).objects(path), path.stem):
            seen.add((raw.text, raw.options, raw.passage))
            yield raw
    for name, _, file, places in KINDS if (data_dir / "gaokao-bench").is_dir() else ():
        for raw in read(_papers(data_dir / "gaokao-bench", file, places), name):
            if (raw.text, raw.options, raw.passage) not in seen:
                yield raw


def subjects(folder: Path, reader: QuestionReader, options: Options) -> list[Subject]:
    """The subjects to score; ``folder`` is GAOKAO-Bench's."""
    result = []
    for name, title, file, places in KINDS:
        shots, scored = first_ones_out(single_answer(_papers(folder, file, places), name, reader))
        result.append(Subject(name=name, title=title, category=title, shots=shots, questions=scored))
    return result
