"""The study ``tokenizer`` on a few hundred kilobytes, including the library's trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.studies.made_text import make_text, prefix
from xverse.tokenizer import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="the compiled part was not built")


@pytest.fixture
def corpus(tmp_path: Path, tiny_texts: list[str]) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "many.txt").write_text("\n".join(tiny_texts), encoding="utf-8")
    chinese = [line for line in tiny_texts if any("\u4e00" <= letter <= "\u9fff" for letter in line)]
    (folder / "zh.txt").write_text("\n".join(chinese * 5), encoding="utf-8")
    return folder


def test_made_text_is_new_and_the_same_again(tmp_path: Path, corpus: Path) -> None:
    first = make_text(corpus, tmp_path / "one", 400_000, seed=1)
    second = make_text(corpus, tmp_path / "two", 400_000, seed=1)
    third = make_text(corpus, tmp_path / "three", 400_000, seed=2)
    assert [path.name for path in first] == ["many.txt", "zh.txt"]
    texts = [path.read_bytes() for path in first]
    assert texts == [path.read_bytes() for path in second]
    assert texts != [path.read_bytes() for path in third]
    assert all(190_000 < len(text) <= 200_000 and text.endswith(b"\n") for text in texts)
    known = set((corpus / "many.txt").read_text(encoding="utf-8").split())
    made = texts[0].decode().split()
    assert 0.2 < sum(word in known for word in made) / len(made) < 0.95
    parts = prefix(first, tmp_path / "prefix", 20_000)
    assert all(text.startswith(part.read_bytes()) for text, part in zip(texts, parts, strict=True))


def test_both_trainers_agree(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--size-mb", "1", "--prefix-mb", "1", "--vocab-size", "900", "--limit-alphabet", "300"]
    where = ["--corpus", str(corpus), "--directory", str(tmp_path), "--peer-minutes", "0.01"]
    assert main(["tokenizer", *sizes, *where]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["equal_merges"] is True
    assert result["whole"]["words"] > 3000
    assert result["whole"]["peak_bytes"] > 10 * 2**20
    assert result["speedup"] > 0
    assert not list(tmp_path.glob("xverse-tokenizer-*"))
    assert main(["tokenizer", *sizes, "--corpus", str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err
