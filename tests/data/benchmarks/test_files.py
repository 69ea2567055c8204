"""Scoring and decontamination read the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xverse.config import UserError
from xverse.data.benchmarks import FILES
from xverse.data.benchmarks.questions import Options, QuestionReader
from xverse.data.prepare.stages.decontaminate import DecontaminateStage
from xverse.eval.benchmarks import BENCHMARKS

COUNTS = {
    "mmlu": 15_858,
    "ceval": 13_948,
    "agieval": 8_269,
    "gaokao-bench": 3_503,
    "gaokao-english": 400,
    "gsm8k": 1_319,
    "humaneval": 164,
    "commonsenseqa": 1_221,
}


def test_every_question_that_is_scored_is_searched_for(test_data: Path) -> None:
    for name, benchmark in BENCHMARKS.items():
        searched = {(raw.text, raw.passage) for raw in FILES[name].all_questions(test_data / "eval")}
        for split in benchmark.splits:
            folder = test_data / "eval" / benchmark.folder
            subjects = benchmark.load(folder, QuestionReader(), Options(split=split))
            for question in (q for subject in subjects for q in (*subject.shots, *subject.questions)):
                # A blank within a passage has no text of its own: its prompt numbers it.
                text = "" if question.text.endswith("空应填：") else question.text
                assert (text, question.passage) in searched, question.id


def test_the_number_of_questions_that_are_searched_for(test_data: Path) -> None:
    counts = {name: sum(1 for _ in files.all_questions(test_data / "eval")) for name, files in FILES.items()}
    assert counts == COUNTS


def test_decontamination_from_a_custom_benchmark(tmp_path: Path) -> None:
    folder = tmp_path / "eval" / "quiz" / "test"
    folder.mkdir(parents=True)
    rows = [{"question": f"Question {i}?", "options": ["yes", "no"], "answer": 0} for i in range(3)]
    (folder / "law.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiz = tmp_path / "quiz.yaml"
    quiz.write_text("name: quiz\nfiles: {test: test/*.jsonl}\nsplit: test\n")
    found = list(DecontaminateStage(tmp_path / "eval", [str(quiz)]).questions())
    assert [(name, raw.id, raw.text) for name, raw in found] == [
        ("quiz", f"test/law/{i}", f"Question {i}?") for i in range(3)
    ]
    with pytest.raises(UserError, match=r"unknown benchmark 'mmul'; did you mean 'mmlu'"):
        list(DecontaminateStage(tmp_path / "eval", ["mmul"]).questions())
    with pytest.raises(UserError, match="mmlu: no such benchmark folder"):
        list(DecontaminateStage(tmp_path / "eval", ["mmlu"]).questions())
    with pytest.raises(UserError, match="contains none of the benchmarks"):
        list(DecontaminateStage(tmp_path / "eval").questions())
