"""GAOKAO-Bench (Zhang et al., arXiv:2305.12474): its objective questions; scored: those with one answer.

Of 1,781 items with 2,944 sub-questions 2,921 have one answer; ``gaokao.py`` takes multi-part items apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.data.benchmarks import gaokao
from xverse.data.benchmarks.questions import (
    LETTERS,
    Options,
    Question,
    QuestionReader,
    RawQuestion,
    Subject,
    check_folder,
    first_ones_out,
    json_file,
)

NAME, FOLDERS = "gaokao-bench", ("gaokao-bench",)
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

Rows = Iterable[tuple[str, dict[str, Any]]]  # objects with their places


def examples(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The items of a file with their places. Raises UserError if the file does not exist."""
    check_folder(path.parent, NAME, "GAOKAO-Bench")
    values = json_file(path)
    rows = values.get("example") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{path}: expected an object with a list "example"')
    return [(f"{path}, example {index}", row) for index, row in enumerate(rows)]


def objective(folder: Path, name: str) -> Path:
    """The file ``name`` among the scored ones of GAOKAO-Bench's folder."""
    return folder / "Data" / "Objective_Questions" / f"{name}.json"


def read(rows: Rows, name: str) -> Iterator[RawQuestion]:
    """Every sub-question of the items. Their ids are NAME/ITEM#PART."""
    for index, (where, row) in enumerate(rows):
        text, answers = row.get("question"), row.get("answer", row.get("answers"))
        problem = ""
        if not isinstance(text, str) or not text.strip():
            problem = "the question has no text"
        elif not isinstance(answers, list) or not all(isinstance(one, str) and one for one in answers):
            problem = "answer: expected a list of letters"
        count = len(answers) if isinstance(answers, list) and answers else 1
        known = answers if not problem and answers else [None] * count
        last = max("D", *(max(answer) for answer in known if answer))
        for number, (part, answer) in enumerate(
            zip(gaokao.parts(str(text or ""), count), known, strict=True)
        ):
            yield RawQuestion(
                id=f"{name}/{index}#{number}",
                where=where,
                text=part.text,
                options=part.options,
                passage=part.shared,
                answer=answer,
                letters=LETTERS[: len(part.options)] or LETTERS[: LETTERS.find(last) + 1],
                number=part.number or number + 1,
                problem=problem if number == 0 else "",
            )


def all_questions(data_dir: Path) -> Iterator[RawQuestion]:
    """Every objective question, also of the later years, for decontamination."""
    folder = data_dir / "gaokao-bench"
    for path in sorted(
        [*folder.glob("Data/Objective_Questions/*.json"), *folder.glob("updates/Data/*/*.json")]
    ):
        yield from read(examples(path), path.stem)


def subjects(folder: Path, reader: QuestionReader, options: Options) -> list[Subject]:
    """The subjects to score."""
    result = []
    for name, (title, category) in FILES.items():
        shots, scored = first_ones_out(single_answer(examples(objective(folder, name)), name, reader))
        result.append(Subject(name=name, title=title, category=category, shots=shots, questions=scored))
    return result


def single_answer(rows: Rows, name: str, reader: QuestionReader) -> list[Question]:
    """The sub-questions with one answer."""
    questions = []
    for raw in read(rows, name):
        if raw.problem:
            reader.refuse(raw.where, raw.problem)
        elif raw.answer is None or len(raw.answer) > 1:
            continue  # of a malformed row, or with several answers
        elif raw.answer not in raw.letters:
            part = raw.id.partition("#")[2]
            reader.refuse(
                raw.where, f"the answer {raw.answer!r} of part {part} is not one of {', '.join(raw.letters)}"
            )
        else:
            questions.append(
                Question(
                    id=raw.id,
                    text=raw.text or f"第 {raw.number} 空应填：",
                    options=raw.options,
                    answer=raw.answer,
                    passage=raw.passage,
                    letters=raw.letters,
                )
            )
    return questions
