"""Every format with every option: the same rows give the same documents."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from xverse.config import UserError
from xverse.data.prepare.inputs import OPTIONS, Input, corpus_units, input_units
from xverse.data.prepare.readers import read_unit
from xverse.texts import ReadReport

ROWS: list[dict[str, Any]] = [
    {"text": "one", "lang": "fr", "source": "s"},
    {"text": "two", "lang": None, "source": None},
    {"text": "three", "lang": "Chinese (Simplified)", "source": None},
    {"text": None, "lang": "fr", "source": None},
    {"text": "   ", "lang": "fr", "source": None},
    {"text": "four\nlines", "lang": None, "source": None},
]
TABLES = ("jsonl", "json", "csv", "tsv", "parquet", "dataset")
TEXTS = ("jsonl", "json", "csv", "tsv", "txt")


def make(folder: Path, kind: str, rows: list[dict[str, Any]], encoding: str = "utf-8") -> dict[str, Any]:
    """Write rows in a format; returns the input's path or dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if kind == "dataset":
        (folder / "train.jsonl").write_text("\n".join(lines))
        return {"dataset": str(folder)}
    path = folder / f"a.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return {"path": str(path)}
    if kind in ("csv", "tsv"):
        buffer = io.StringIO(newline="")
        table = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        table.writeheader()
        table.writerows(rows)
        text = buffer.getvalue()
    else:
        text = f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines) + "\n"
    if kind == "txt":
        text = "\n".join(row["text"] for row in rows) + "\n"
    path.write_bytes(text.encode(encoding))
    return {"path": str(path)}


def read(limit: int = 10_000, **given: Any) -> tuple[list[tuple[str, str]], ReadReport]:
    report = ReadReport()
    units = input_units([Input(**given)])
    documents = [document for unit in units for document in read_unit(unit, report, limit)]
    return [(document.text, document.lang) for document in documents], report


@pytest.mark.parametrize("kind", TABLES)
def test_languages_nulls_and_columns(tmp_path: Path, kind: str) -> None:
    given = make(tmp_path / "a", kind, ROWS)
    found, report = read(**given)
    assert found == [("one", "fr"), ("two", ""), ("four\nlines", "")]
    assert (report.bad_lang, report.no_text + report.empty) == (1, 2)
    found, report = read(**given, lang="zh")  # which counts, whatever the rows say
    assert found == [(text, "zh") for text in ("one", "two", "three", "four\nlines")]
    assert (report.bad_lang, report.no_text + report.empty) == (0, 2)
    renamed = [{"body": row["text"], "lang": row["lang"]} for row in ROWS]
    given = make(tmp_path / "b", kind, renamed)
    assert read(**given, text_key="body", lang="zh")[0] == found
    if kind in ("jsonl", "json"):  # a row may lack it, so all rows are skipped, with a hint
        assert "line 1 has no 'text' but body: set text_key" in read(**given)[1].describe()
    else:
        with pytest.raises(UserError, match=r"no column 'text' \(it has body, lang\); set text_key"):
            read(**given)
    found, report = read(limit=200, **make(tmp_path / "c", kind, [{"text": "ä" * 150}, {"text": "b"}]))
    assert found == [("b", "")] or report.broken_files  # a field of CSV that is too long ends the file
    assert report.too_long == 1 or report.broken_files


CHINESE = [{"text": "这是中国的一个文件，我们在这里说话，也有 ABC。"}, {"text": "他们说不是我的，是大家的。"}]
RUSSIAN = [{"text": "Это обычный текст на русском языке."}]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(
    ("encoding", "named", "rows"),
    [
        ("utf-8", None, CHINESE),
        ("utf-8-sig", None, CHINESE),
        ("utf-16", None, CHINESE),
        ("utf-16-le", None, RUSSIAN),
        ("utf-16-be", None, CHINESE),
        ("utf-32", None, CHINESE),
        ("gb18030", None, CHINESE),
        ("gb18030", "GB18030", CHINESE),
        ("big5", "big5", [{"text": "這是一個檔案"}]),
        ("cp1251", "windows-1251", RUSSIAN),
        ("utf-16-be", "utf-16-be", RUSSIAN),
    ],
)
def test_encodings(tmp_path: Path, kind: str, encoding: str, named: str | None, rows: list[Any]) -> None:
    given = {**make(tmp_path, kind, rows, encoding), "encoding": named, "lines": kind == "txt", "lang": "zh"}
    expected = [(row["text"], "zh") for row in rows]
    found, report = read(**given)
    assert found == expected
    assert bool(report.encoding) == (not encoding.startswith("utf-8"))
    path = Path(given["path"])
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(**{**given, "path": str(packed)})[0] == expected


def test_what_is_not_utf8_is_not_guessed_rashly(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text, encoding in (
        ("Это обычный текст на русском языке, в котором много слов.\n", "cp1251"),
        ("Le garçon a été élevé à la forêt où les élèves étaient.\n", "latin-1"),
        ("이것은 한국어로 쓴 보통 글입니다. 사람들이 말하는 것처럼.\n", "euc-kr"),
        ("これは普通の日本語の文章です。日本の人々が読みます。\n", "shift_jis"),
        ("這是一個普通的檔案，我們在這裡說話，他們也在這裡。\n", "big5"),
    ):
        path.write_bytes((text * 40).encode(encoding))
        found, report = read(path=str(path), lines=True)
        assert (found, report.encoding, report.bad_utf8) == ([], "", 40), encoding
        assert report.describe().endswith("name the encoding, such as encoding: gb18030")
    good = "好的一行在这里\n".encode()
    path.write_bytes(good * 30 + "坏的一行在这里\n".encode("gb18030") + good)  # one bad line of many
    found, report = read(path=str(path), lines=True)
    assert (len(found), report.bad_utf8, report.encoding) == (31, 1, "")
    path.write_bytes("我们在这里说的是中国的话\n".encode("gb18030") * 9 + b"\xff\xff\n")
    found, report = read(path=str(path), lines=True)
    assert len(found) == 9
    assert report.describe() == "1 lines skipped: 1 invalid gb18030"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", [*TABLES, "txt"])
def test_no_option_is_swallowed(tmp_path: Path, option: str, kind: str) -> None:
    given = make(tmp_path, kind, [{"text": "x", "body": "y"}])
    value = {"text_key": "body", "encoding": "utf-8", "lines": True, "split": "test"}.get(option, "x")
    if ("jsonl" if kind == "json" else kind) in OPTIONS[option]:
        if kind != "dataset":
            assert read(**given, **{option: value})[0]
    else:
        with pytest.raises(UserError, match=f"{option} applies to {', '.join(OPTIONS[option])}, and this"):
            read(**given, **{option: value})


def test_arrays_are_read_item_by_item(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.json", [{"text": f'{number} \\ "{"x" * 40_000}"'} for number in range(20)]
    path.write_text(" \n" + json.dumps(rows, indent=1))  # cut by blocks of 64 KB everywhere
    assert [text for text, _ in read(limit=100_000, path=str(path))[0]] == [row["text"] for row in rows]
    for content, left, why in (
        ('[{"text": "a"}, {"text": "b"', ["a"], "item 2"),
        ('[{"text": "a"} {"text": "b"}]', ["a"], "item 2 (Expecting ',' delimiter)"),
        ('[{"text": "a"}, nope]', ["a"], "item 2"),
        ('[{"text": "a"}, {"text": "' + "x" * 300_000 + '"}]', ["a"], "item 2 (too long)"),
        ("[" * 100_000, [], "item 1"),
        ("[]", [], None),
        ('[{"text": "a"}]\n[{"text": "b"}]', ["a"], "after item 1 (text after the end"),
        ('[{"text": "a"}, {"n": ' + "9" * 5_000 + "}]", ["a"], "item 2 (Exceeds the limit"),
        ('[1, "a", {"text": "b"}, [2]]', ["b"], None),
    ):
        path.write_text(content)
        found, report = read(limit=100_000, path=str(path))
        assert [text for text, _ in found] == left
        assert (why in report.broken_files[0]) if why else not report.broken_files, content[:40]


@pytest.mark.parametrize("kind", [*TEXTS, "warc"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_files_without_anything_are_no_error(tmp_path: Path, kind: str, packing: str) -> None:
    if kind == "warc" and packing == ".zst":
        return
    path = tmp_path / f"a.{kind}{packing}"
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        if kind == "warc" and content:
            continue
        path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing](content))
        assert read(path=str(path))[0] == []
        assert read(path=str(path))[1].describe() == ""
    path.write_bytes(b"")
    found, report = read(path=str(path))
    assert (found, report.describe()) == ([], "")


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_stream_that_is_cut_short_is_reported(tmp_path: Path, kind: str, compress: Any) -> None:
    rows = [{"text": f"{number} {number**7}"} for number in range(20_000)]
    plain = Path(make(tmp_path / "plain", kind, rows)["path"])
    packed = tmp_path / f"{plain.name}.{'gz' if compress is gzip.compress else 'zst'}"
    data = compress(plain.read_bytes())
    for name in (packed, packed.with_suffix(f".{kind}")):  # also where only the first bytes say so
        name.write_bytes(data)
        whole, report = read(path=str(name), lines=kind == "txt", limit=10**7)
        assert (len(whole), report.describe()) == (20_000, ""), name
        for cut in (len(data) - 2, len(data) * 2 // 3):
            name.write_bytes(data[:cut])
            found, report = read(path=str(name), lines=kind == "txt", limit=10**7)
            assert found == whole[: len(found)]
            assert len(report.broken_files) == 1, (name, cut)
        name.unlink()


def test_names_in_capitals_links_and_hidden_folders(tmp_path: Path) -> None:
    for kind in TABLES[:-1]:
        path = Path(make(tmp_path / "x" / kind, kind, [{"text": kind}])["path"])
        path.rename(path.with_name(path.name.upper()))
    (tmp_path / "x" / ".git").mkdir()
    (tmp_path / "x" / ".git" / "a.jsonl").write_text('{"text": "hidden"}')
    (tmp_path / "x" / "self").symlink_to(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "linked").symlink_to(tmp_path / "x")
    expected = sorted(TABLES[:-1])
    for path in (tmp_path / "x", tmp_path / "y", tmp_path / "x" / "**" / "*.*"):
        assert sorted(text for text, _ in read(path=str(path))[0]) == expected
    assert read(path=str(tmp_path / "x" / ".git" / "*"))[0] == [("hidden", "")]
    with pytest.raises(ValueError, match="either a path or a dataset"):
        Input(path="")


def test_parquet_holds_any_bytes(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data = [b"one", b"\xff\xfe", None, "zwei ä".encode(), b"\xe4", b"three"]
    kinds = [pyarrow.array(data, pyarrow.binary())]
    kinds.append(pyarrow.Array.from_buffers(pyarrow.string(), len(data), kinds[0].buffers()))
    for number, column in enumerate(kinds):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        found, report = read(path=str(tmp_path / "a.parquet"))
        assert [text for text, _ in found] == ["one", "zwei ä", "three"], number
        assert (report.bad_utf8, report.no_text, report.broken_files) == (2, 1, [])


def test_named_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for given in ("utf-16", "utf-32"):  # without a mark too
        for written in (given, f"{given}-le", *(["utf-16-be"] if given == "utf-16" else [])):
            path.write_text('{"text": "Ein Satz, über den sich reden lässt."}\n', encoding=written)
            found, _ = read(path=str(path), encoding=given)
            assert found == [("Ein Satz, über den sich reden lässt.", "")], (given, written)
    for name in ("undefined", "idna", "punycode", "rot13", "base64", "hex", "", "a b", "utf-9"):
        with pytest.raises(UserError, match="unknown encoding"):
            Input(path="x", encoding=name)


def test_broken_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,lang\none,en\nshort\n"two\nlines",en\n"open')
    found, report = read(path=str(path))
    assert found == [("one", "en"), ("two\nlines", "en")]
    assert report.describe().startswith("1 lines skipped: 1 with another number of fields; line ")
    path.write_text(",text\n0,one\n1,two\n")  # pandas' index
    assert [text for text, _ in read(path=str(path))[0]] == ["one", "two"]
    path.write_bytes(b"text\ngood\nb\xffd\n")
    found, report = read(path=str(path))
    assert (found, report.bad_utf8) == ([("good", "")], 1)


def test_folders_take_what_is_text(tmp_path: Path) -> None:
    make(tmp_path, "csv", [{"text": "c"}])
    make(tmp_path, "json", [{"text": "j"}])
    (tmp_path / "info.json").write_text('{"features": 1}')
    (tmp_path / "pretty.json").write_text('{\n "version": 1\n}')
    (tmp_path / "README.md").write_text("about")
    assert [text for text, _ in read(path=str(tmp_path))[0]] == ["c", "j"]
    with pytest.raises(UserError, match=rf"for a\.csv and the like, write inputs: \[{{path: {tmp_path}}}\]"):
        corpus_units(tmp_path)
    with pytest.raises(ValueError, match="format is an option of path"):
        Input(dataset="x", format="jsonl")
    with pytest.raises(UserError, match="unknown encoding 'utf-9'"):
        Input(path="x", encoding="utf-9")
