"""C-Eval (Huang et al., arXiv:2305.08322), answers without reasoning, as the authors' script asks it."""

from __future__ import annotations

from pathlib import Path

from xverse.config import UserError
from xverse.data.benchmarks.questions import Question, Reader, Subject, json_file
from xverse.eval.benchmark import Benchmark, Options, lettered

COLUMNS = ("id", "question", "A", "B", "C", "D")


def load(folder: Path, reader: Reader, options: Options) -> list[Subject]:
    split = options.split or "val"
    if not (folder / split).is_dir():
        raise UserError(f"{folder / split}: no such folder; `xverse eval fetch ceval` gets C-Eval")
    subjects = []
    for name, (_, title, category) in json_file(folder / "subject_mapping.json").items():
        shots = _questions(folder, "dev", name, reader)
        subjects.append(
            Subject(
                name=name,
                title=title,
                category=category,
                shots=tuple(shots[:5]),
                questions=tuple(_questions(folder, split, name, reader)),
            )
        )
    return subjects


def _questions(folder: Path, split: str, name: str, reader: Reader) -> list[Question]:
    found = []
    columns = COLUMNS if split == "test" else (*COLUMNS, "answer")
    for where, row in reader.rows(folder / split / f"{name}_{split}.csv", columns):
        if len(row) < len(columns):
            reader.refuse(where, f"{len(row)} columns, expected {len(columns)}")
            continue
        answer = None if split == "test" else row[6]
        question = reader.question(where, row[1], row[2:6], answer, id=f"{name}/{row[0]}")
        if question is not None:
            found.append(question)
    return found


BENCHMARK = Benchmark(
    name="ceval",
    title="C-Eval",
    folder="ceval",
    split="val",
    splits=("val", "test"),
    load=load,
    header=lambda subject: f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n",
    item=lambda question: f"{question.text}{lettered(question)}\n答案：",
    answer=lambda question, letter: letter,
    between="\n\n",
    average="macro",
    categories=("STEM", "Social Science", "Humanities", "Other"),
    shots_rule="the five questions of the dev set",
    method='tokens of "A" to "D"; the val set, as the answers of the test set are not public',
    source="https://cevalbenchmark.com",
)
