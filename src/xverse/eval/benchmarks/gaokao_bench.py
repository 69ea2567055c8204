"""GAOKAO-Bench (Zhang et al., arXiv:2305.12474): its objective questions that have one answer.

Of 1,781 items with 2,944 sub-questions 2,921 have one answer; multi-part items are taken apart by
``data/benchmarks/gaokao.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.data.benchmarks import gaokao
from xverse.data.benchmarks.questions import LETTERS, Question, Reader, Subject, json_file
from xverse.eval.benchmark import SHOTS_TAKEN_OUT, Benchmark, Options, first_ones_out, lettered

FILES = {
    "2010-2022_Chinese_Modern_Lit": ("语文现代文阅读", "语文"),
    "2010-2022_Chinese_Lang_and_Usage_MCQs": ("语文语言文字运用", "语文"),
    "2010-2013_English_MCQs": ("英语", "英语"),
    "2010-2022_English_Fill_in_Blanks": ("英语完形填空", "英语"),
    "2010-2022_English_Reading_Comp": ("英语阅读理解", "英语"),
    "2012-2022_English_Cloze_Test": ("英语七选五", "英语"),
    "2010-2022_Math_I_MCQs": ("数学（理科）", "数学"),
    "2010-2022_Math_II_MCQs": ("数学（文科）", "数学"),
    "2010-2022_Physics_MCQs": ("物理", "理综"),
    "2010-2022_Chemistry_MCQs": ("化学", "理综"),
    "2010-2022_Biology_MCQs": ("生物", "理综"),
    "2010-2022_History_MCQs": ("历史", "文综"),
    "2010-2022_Geography_MCQs": ("地理", "文综"),
    "2010-2022_Political_Science_MCQs": ("政治", "文综"),
}


def load(folder: Path, reader: Reader, options: Options) -> list[Subject]:
    subjects = []
    for name, (title, category) in FILES.items():
        shots, scored = first_ones_out(questions(examples(folder, name), name, reader))
        subjects.append(Subject(name=name, title=title, category=category, shots=shots, questions=scored))
    return subjects


def examples(folder: Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The items of a file with their places. Raises UserError where there is no such file."""
    place = folder / "Data" / "Objective_Questions"
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; `xverse eval fetch gaokao-bench` gets GAOKAO-Bench")
    path = place / f"{name}.json"
    values = json_file(path)
    found = values.get("example") if isinstance(values, dict) else None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f'{path}: expected an object with a list "example"')
    return [(f"{path}, example {index}", row) for index, row in enumerate(found)]


def questions(rows: Iterable[tuple[str, dict[str, Any]]], name: str, reader: Reader) -> list[Question]:
    """All sub-questions with one answer. Their ids are NAME/ITEM#PART."""
    found = []
    for index, (where, row) in enumerate(rows):
        text, answers = row.get("question"), row.get("answer")
        if not isinstance(text, str) or not text.strip():
            reader.refuse(where, "the question has no text")
        elif not isinstance(answers, list) or not all(isinstance(each, str) and each for each in answers):
            reader.refuse(where, "answer: expected a list of letters")
        else:
            found += _taken_apart(text, answers, f"{name}/{index}", where, reader)
    return found


def _taken_apart(text: str, answers: Sequence[str], item: str, where: str, reader: Reader) -> list[Question]:
    found = []
    parts = gaokao.parts(text, len(answers))
    most = max("D", *(max(answer) for answer in answers))
    for index, (part, answer) in enumerate(zip(parts, answers, strict=True)):
        if len(answer) > 1:
            continue  # several answers
        letters = LETTERS[: len(part.options)] if part.options else LETTERS[: LETTERS.index(most) + 1]
        if answer not in letters:
            reader.refuse(where, f"the answer {answer!r} of part {index} is none of {', '.join(letters)}")
            continue
        own = part.text or f"第 {part.number or index + 1} 空应填："
        found.append(
            Question(
                id=f"{item}#{index}",
                text=own,
                options=part.options,
                answer=answer,
                passage=part.shared,
                letters=letters,
            )
        )
    return found


def item(question: Question) -> str:
    passage = f"{question.passage}\n" if question.passage else ""
    options = f"\n选项：{lettered(question)}" if question.options else ""
    return f"{passage}{question.text}{options}\n答案："


def header(subject: Subject) -> str:
    return f"以下是中国高考{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n"


BENCHMARK = Benchmark(
    name="gaokao-bench",
    title="GAOKAO-Bench",
    folder="gaokao-bench",
    split="2010-2022",
    splits=("2010-2022",),
    load=load,
    header=header,
    item=item,
    answer=lambda question, letter: letter,
    between="\n\n",
    average="micro",
    categories=("语文", "英语", "数学", "理综", "文综"),
    shots_rule=SHOTS_TAKEN_OUT,
    method='tokens of "A" to "D" (to "G" where there are so many options); sub-questions with one answer',
    source="https://github.com/OpenLMLab/GAOKAO-Bench",
)
