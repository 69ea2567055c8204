"""Readers of data never guess types: the same texts written in every format are read back equal."""

from __future__ import annotations

import csv
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.config import UserError
from xverse.data.benchmarks import custom, mmlu
from xverse.data.benchmarks.questions import QuestionReader
from xverse.data.dialogues.formats import Skip, guess, is_undesirable, to_dialogue, to_text
from xverse.data.prepare.inputs import Input, input_units
from xverse.data.prepare.readers import read_unit
from xverse.finetune.settings import DatasetUse
from xverse.finetune.sources import SourceFile, find_sources, read_file
from xverse.texts import ReadReport, load_texts

# Texts that some reader takes for a number, a date, a missing value or the end of a line.
LOOKALIKES = [
    *("1", "01", "1.0", "1e5", "-0", "0x10", "1_000", "1,000", "+3", ".5", "NaN", "inf", "-Infinity"),
    *("NA", "N/A", "None", "null", "nan", "True", "false", "yes", "2024-01-02", "12:30", "1/2", "=1+1"),
    *(
        "a\x0cb",
        "a\x0bb",
        "a\u2028b",
        "a\u2029b",
        "a\x85b",
        "a\x1cb",
        "a\x00b",
        "\ufeffx",
        "[1]",
        "{}",
        '"',
        "'",
    ),
    *("a\nb", "a\r\nb", "a\rb", "a\tb", "a,b", 'say "hi"', "#x", " padded ", "你好", "🙂", "é", "é"),
]
TEXT = st.one_of(
    st.sampled_from(LOOKALIKES), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
)
RECORD = st.fixed_dictionaries({"instruction": TEXT, "input": TEXT, "output": TEXT})


def write(folder: Path, kind: str, records: list[dict[str, Any]]) -> Path:
    path = folder / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif kind == "jsonl":
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        path.write_text("\n".join(lines), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, list(records[0]), delimiter="\t" if kind == "tsv" else ",")
            rows.writeheader()
            rows.writerows(records)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def items(path: Path, stage: str = "sft", skipped: Counter[str] | None = None) -> list[Any]:
    (source,) = find_sources([DatasetUse(name=path.name)], path.parent)
    file = SourceFile(source, path, path.name, in_folder=False)
    return [item for item, _ in read_file(file, stage, Counter() if skipped is None else skipped)]


@settings(max_examples=examples(25), deadline=None)
@given(st.lists(RECORD, min_size=1, max_size=8))
def test_the_same_records_in_every_format(records: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("json", "jsonl", "csv", "tsv", "parquet"):
            assert items(write(Path(folder), kind, records)) == records, kind


def test_the_lookalikes_one_by_one(tmp_path: Path) -> None:
    records = [{"instruction": text, "input": "", "output": text} for text in LOOKALIKES]
    for kind in ("json", "jsonl", "csv", "tsv", "parquet"):
        assert items(write(tmp_path, kind, records)) == records, kind


@settings(max_examples=examples(25), deadline=None)
@given(st.lists(TEXT.map(lambda text: text.replace("\n", " ").rstrip("\r")), min_size=1, max_size=8))
def test_lines_of_text_files(lines: list[str]) -> None:
    expected = [line for line in lines if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        for end in ("\n", "\r\n"):
            path = Path(folder, "data.txt")
            path.write_bytes(end.join(["first", *lines]).encode())
            found = items(path, "pt")
            assert [to_text(item, guess(item, "x")) for item in found] == ["first", *expected]
            units = input_units([Input(path=str(path), lines=True, lang="en")])
            texts = [document.text for document in read_unit(units[0], ReadReport(), 1 << 20)]
            assert [text.strip("\r\n") for text in texts] == [
                line.strip("\r\n") for line in ["first", *expected]
            ]
            (whole,) = load_texts(path)  # calibration text
            assert whole == end.join(["first", *lines])


@settings(max_examples=examples(25), deadline=None)
@given(st.lists(st.tuples(*[TEXT.filter(str.strip)] * 5, st.sampled_from("ABCD")), min_size=1, max_size=5))
def test_benchmarks(rows: list[tuple[str, ...]]) -> None:
    names = ["question", "A", "B", "C", "D", "answer"]
    records = [dict(zip(names, row, strict=True)) for row in rows]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = folder / "plain.csv"
        with plain.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        first, *_ = rows[0]
        read = list(mmlu.read(plain, "x", QuestionReader()))
        if not first.startswith("\ufeff"):  # a byte order mark at the beginning of a file belongs to the file
            assert [(raw.text, *raw.options, raw.answer) for raw in read] == rows
        for kind in ("csv", "jsonl"):
            path = write(folder, kind, records)
            description = custom.Description(
                name="x", files={"test": f"*.{kind}"}, split="test", options=["A", "B", "C", "D"]
            )
            raws = list(custom.read(description, path, "x", QuestionReader()))
            assert [(raw.text, *raw.options, raw.answer) for raw in raws] == rows
            assert not any(raw.problem for raw in raws)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (5, "not text (assistant: a number)"),
        (1e5, "not text (assistant: a number)"),
        (True, "not text (assistant: true or false)"),
        (None, "not text (assistant: missing)"),
        ({"a": 1}, "not text (assistant: an object)"),
        (["a"], "parts that are not text"),
        ("", "empty text"),
    ],
)
def test_other_types_are_left_out_with_their_reason(value: Any, reason: str) -> None:
    item = {"instruction": "x", "input": "", "output": value}
    with pytest.raises(Skip) as error:
        to_dialogue(item, guess(item, "x"))
    assert str(error.value) == reason


def test_questions_of_other_types_are_refused_with_their_reason(tmp_path: Path) -> None:
    description = custom.Description(name="x", files={"test": "*.jsonl"}, split="test")
    good = {"question": "q", "options": ["a", "b"], "answer": "A"}
    for wrong, why in (
        ({"question": 5}, "question is a number, not text"),
        ({"options": ["a", 2]}, "one is a number"),
        ({"answer": True}, "the answer True is not one of A, B"),
        ({"answer": 7}, "the answer 'H' is not one of A, B"),
    ):
        path = write(tmp_path, "jsonl", [{**good, **wrong}])
        reader = QuestionReader()
        (raw,) = custom.read(description, path, "x", reader)
        with pytest.raises(UserError, match=why):
            reader.question(raw)


def test_rows_of_another_length_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('instruction,output\nhi,there\nlost\n\n"a,b",c,d\nso,long\n', encoding="utf-8")
    skipped: Counter[str] = Counter()
    assert [item["instruction"] for item in items(path, skipped=skipped)] == ["hi", "so"]
    assert skipped == {"ill-formed rows": 2}
    for header in ("a,a\n", "a,b,,a\n"):
        path.write_text(header, encoding="utf-8")
        with pytest.raises(UserError, match="must name the columns"):
            items(path)


def test_what_csv_can_only_write_as_text(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "1e5"}]
    for kind in ("jsonl", "csv", "tsv"):
        whole = turns if kind == "jsonl" else json.dumps(turns)
        label: Any = False if kind == "jsonl" else "False"
        (item,) = items(write(tmp_path, kind, [{"conversations": whole, "label": label}]))
        info = guess(item, "x")
        assert to_dialogue(item, info) == [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "1e5"},
        ]
        assert is_undesirable(item, info)
