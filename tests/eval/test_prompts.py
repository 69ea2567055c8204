"""The prompts are the authors' own, byte for byte; the questions are all there."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from xverse.data.benchmarks.questions import Options
from xverse.eval.benchmarks import BENCHMARKS
from xverse.eval.run import LoadedBenchmark, load_benchmarks

# Of all prompts with five shots, one after another, each with a zero byte behind it.
DIGESTS = {
    "mmlu": "69b7fe0aebc208ceeaabf3203a2f952b4940b75b889a4eaa7c67363201269df2",
    "ceval": "4e85bbf4bcf230a3c9770acd6603535285bdd0c464439c2156dd201ac92ed993",
}


@pytest.fixture(scope="module")
def data(test_data: Path) -> Path:
    return test_data / "eval"


def read(name: str, data: Path, **options: Any) -> LoadedBenchmark:
    (found,) = load_benchmarks([name], data, options=Options(**options))
    return found


def prompts(found: LoadedBenchmark) -> list[str]:
    return [
        found.benchmark.prompt(subject, question, 5)
        for subject in found.subjects
        for question in subject.questions
    ]


@pytest.mark.parametrize("name", DIGESTS)
def test_digests(data: Path, name: str) -> None:
    whole = hashlib.sha256()
    for prompt in prompts(read(name, data)):
        whole.update(prompt.encode() + b"\0")
    assert whole.hexdigest() == DIGESTS[name]


def test_mmlu_is_what_the_authors_script_makes(data: Path) -> None:
    """Written after their script, which reads the files with pandas: there "None" becomes "nan"."""
    pandas = pytest.importorskip("pandas")
    found = read("mmlu", data)
    for subject in found.subjects:
        tables = [
            pandas.read_csv(data / f"mmlu/data/{split}/{subject.name}_{split}.csv", header=None)
            for split in ("dev", "test")
        ]
        words = "".join(f" {word}" for word in subject.name.split("_"))
        head = f"The following are multiple choice questions (with answers) about {words}.\n\n"
        for row in tables[0].itertuples(index=False):
            head += _theirs(row) + f" {row[-1]}\n\n"
        theirs = [head + _theirs(row) for row in tables[1].itertuples(index=False)]
        assert [found.benchmark.prompt(subject, each, 5) for each in subject.questions] == theirs


def _theirs(row: Any) -> str:
    options = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", row[1:-1], strict=True))
    return f"{row[0]}{options}\nAnswer:"


def test_ceval_is_what_the_authors_script_makes(data: Path) -> None:
    pandas = pytest.importorskip("pandas")
    found = read("ceval", data)
    for subject in found.subjects:
        tables = [
            pandas.read_csv(data / f"ceval/{split}/{subject.name}_{split}.csv") for split in ("dev", "val")
        ]
        head = f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n\n"
        for _, row in tables[0].iterrows():
            head += _theirs_chinese(row) + f"{row['answer']}\n\n"
        theirs = [head + _theirs_chinese(row) for _, row in tables[1].iterrows()]
        assert [found.benchmark.prompt(subject, each, 5) for each in subject.questions] == theirs


def _theirs_chinese(row: Any) -> str:
    options = "".join(f"\n{letter}. {row[letter]}" for letter in "ABCD")
    return f"{row['question']}{options}\n答案："


def test_the_ten_cells_that_pandas_loses(data: Path) -> None:
    cells = Counter(
        subject.name
        for subject in read("mmlu", data).subjects
        for question in subject.questions
        for option in question.options
        if option == "nan"
    )
    assert cells == {
        "college_computer_science": 2,
        "college_mathematics": 3,
        "college_physics": 1,
        "electrical_engineering": 4,
    }
    mended = [
        option
        for subject in read("mmlu", data, fix_none=True).subjects
        for question in subject.questions
        for option in question.options
    ]
    assert mended.count("None") == 10
    assert "nan" not in mended


@pytest.mark.parametrize(
    ("name", "subjects", "scored", "categories"),
    [
        ("mmlu", 57, 14042, {"STEM": 3018, "humanities": 4705, "social sciences": 3077, "other": 3242}),
        ("ceval", 52, 1346, {"STEM": 430, "Social Science": 275, "Humanities": 257, "Other": 384}),
        ("agieval", 16, 4903 - 80, {"English": 2305, "Chinese": 2518}),
        ("gaokao-bench", 14, 2921 - 70, {"语文": 157, "英语": 1285, "数学": 422, "理综": 300, "文综": 687}),
        ("gaokao-english", 3, 400 - 15, {"阅读理解": 145, "七选五": 45, "完形填空": 195}),
    ],
)
def test_counts(data: Path, name: str, subjects: int, scored: int, categories: dict[str, int]) -> None:
    found = read(name, data)
    assert len(found.subjects) == subjects
    assert found.count == scored
    by_category = Counter(subject.category for subject in found.subjects for _ in subject.questions)
    assert by_category == categories
    for subject in found.subjects:
        assert len(subject.shots) == 5
        ids = [question.id for question in subject.questions]
        assert len(set(ids)) == len(ids)
        assert all(shot.answer for shot in subject.shots)


def test_ceval_subjects_by_category(data: Path) -> None:
    found = Counter(subject.category for subject in read("ceval", data).subjects)
    assert found == {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11}
    assert read("ceval", data, split="test").count == 12342


def test_how_prompts_look(data: Path) -> None:
    first = {name: prompts(read(name, data))[0] for name in BENCHMARKS}
    assert first["mmlu"].startswith(
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\nFind all c"
    )
    assert first["mmlu"].endswith("\nAnswer:")
    assert first["ceval"].startswith("以下是中国关于计算机网络考试的单项选择题，请选出其中的正确答案。\n\n")
    for name in ("ceval", "gaokao-bench", "gaokao-english"):
        assert first[name].endswith("\n答案：")
        assert first[name].count("\n答案：") == 6
    assert first["gaokao-english"].startswith(
        "以下是中国高考英语阅读理解的单项选择题，请选出其中的正确答案。\n\n"
    )
    assert "\n选项：\nA. " in first["gaokao-english"]


def test_gaokao_english_are_the_ten_papers(data: Path) -> None:
    """Read out of GAOKAO-Bench: the same as the copy that was put together by papers."""
    import json

    path = data / "gaokao-english" / "reconstructed_from_gaokao_bench.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = Counter((row["subdataset"], answer) for row in rows for answer in row["answer"])
    found = read("gaokao-english", data)
    ours = Counter(
        (subject.name, question.answer)
        for subject in found.subjects
        for question in (*subject.shots, *subject.questions)
    )
    assert ours == answers
