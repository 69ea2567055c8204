"""Taking scanned questions apart."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from xverse.data.benchmarks import gaokao

READING = """A story of two lines.
24. Why did they come?
A. To see.  B. To buy.
C. To sell.  D. To rest.
25 What is it about?
A. Apes.\tB. Bees.
CThey lived with cats.\tD. Dogs.
26. What is the text?
A. A news report.\tB. A book review.\tC. A letter.\tD. A diary.
"""


def test_sub_questions_with_scanning_errors() -> None:
    parts = gaokao.parts(READING, 3)
    assert [part.number for part in parts] == [24, 25, 26]
    assert {part.shared for part in parts} == {"A story of two lines."}
    assert [part.text.splitlines()[0] for part in parts] == [
        "24. Why did they come?",
        "25 What is it about?",
        "26. What is the text?",
    ]
    assert parts[1].options == ("Apes.", "Bees.", "They lived with cats.", "Dogs.")
    assert parts[2].options[0] == "A news report."


def test_in_one_line() -> None:
    text = "据此完成 1～2 题。 1．原因（） A.甲 B.乙 C.丙 D.丁 2.结果（） A.戊 B.己 C.庚 D.辛"
    one, two = gaokao.parts(text, 2)
    assert one.shared == two.shared == "据此完成 1～2 题。"
    assert one.options == ("甲", "乙", "丙", "丁")
    assert two.text == "2.结果（）"


def test_blanks_with_options_for_all() -> None:
    text = "One 71 is. Two 72 is. Three 73 is.\nA. a\nB. b\nC. c\nD. d\nE. e\nF. f\nG. g"
    parts = gaokao.parts(text, 3)
    assert [part.number for part in parts] == [71, 72, 73]
    assert all(part.options == tuple("abcdefg") and part.text == "" for part in parts)
    assert parts[0].shared == "One 71 is. Two 72 is. Three 73 is."


def test_without_numbers() -> None:
    text = "Text.\n　\nA．a\nB．b\nC．c\nD．d\n（2）Second?\nA．e\nB．f\nC．g\nD．h"
    one, two = gaokao.parts(text, 2)
    assert one.options == tuple("abcd")
    assert two.text == "（2）Second?"
    assert two.options == tuple("efgh")


def test_options_that_are_pictures_stay_in_the_text() -> None:
    text = "Which curve?\nA．  B．  \nC．  D．"
    (part,) = gaokao.parts(text, 1)
    assert part.options == ()
    assert part.text == text


@given(st.text(alphabet="ABCD12．. \n（）一二", max_size=80), st.integers(1, 5))
def test_any_text_has_its_parts(text: str, count: int) -> None:
    parts = gaokao.parts(text, count)
    assert len(parts) == count
    for part in parts:
        assert len(part.options) == 0 or len(part.options) >= 4


def test_the_whole_of_gaokao_bench(test_data: Path) -> None:
    """2,944 sub-questions: all but six have their options, four or seven that are as long as options are."""
    folder = test_data / "eval" / "gaokao-bench" / "Data" / "Objective_Questions"
    without, found = 0, 0
    for path in sorted(folder.glob("*.json")):
        for example in json.loads(path.read_text(encoding="utf-8"))["example"]:
            parts = gaokao.parts(example["question"], len(example["answer"]))
            for part, answer in zip(parts, example["answer"], strict=True):
                found += 1
                without += not part.options
                if part.options:
                    assert len(part.options) == (7 if "Cloze" in path.name else 4)
                    assert max(map(len, part.options)) < 400
                    assert all(letter in "ABCDEFG"[: len(part.options)] for letter in answer)
                assert len(part.text) + len(part.shared) > 5
    assert found == 2944
    assert without == 6
