"""Texts for calibration and parity: what is read, what is refused, what is remarked on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.config import UserError
from xverse.quant import text
from xverse.quant.text import calibration_tokens, parity_tokens

ENGLISH = "The miller opened the sluice, and slowly the great wheel began to turn. " * 60


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(text, "notice", said.append)
    return said


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_becomes_rows(tmp_path: Path, tiny_tokenizer: Any, notices: list[str]) -> None:
    rows = calibration_tokens(tiny_tokenizer, _write(tmp_path / "a.txt", ENGLISH))
    assert rows.dtype == torch.int64
    assert rows.shape[1] == 512
    ids = tiny_tokenizer.encode(ENGLISH)
    assert rows.flatten().tolist() == ids[: rows.numel()]
    assert notices == []


def test_json_lines_and_gzip_give_the_same(tmp_path: Path, tiny_tokenizer: Any) -> None:
    lines = "\n".join(json.dumps({"text": part, "lang": "en"}) for part in (ENGLISH, ENGLISH)) + "\n"
    plain = calibration_tokens(tiny_tokenizer, _write(tmp_path / "a.jsonl", lines))
    zipped = calibration_tokens(
        tiny_tokenizer, _write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode()))
    )
    assert torch.equal(plain, zipped)
    assert plain[0].tolist() == tiny_tokenizer.encode(ENGLISH)[:512]


def test_long_text_is_taken_from_everywhere(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "CALIBRATION_TOKENS", 2048)
    monkeypatch.setattr(text, "_READ", 8192)
    content = ENGLISH * 20 + "zzzz " * 20000
    rows = calibration_tokens(tiny_tokenizer, _write(tmp_path / "a.txt", content))
    assert rows.numel() <= 2048
    assert "miller" in tiny_tokenizer.decode(rows[0].tolist())
    assert "zzzz" in tiny_tokenizer.decode(rows[-1].tolist())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\t\n", "is empty"),
        ("a.jsonl", "\n", "is empty"),
        ("a.txt", "too little", "too few; give at least 256"),
        ("a.txt", b"\xff\xfe\x00", "invalid UTF-8 at byte 0"),
        ("a.jsonl", '{"text": "x"}\n{"content": "x"}\n', 'line 2: expected a JSON object with a "text"'),
        ("a.jsonl", "[]\n", "line 1: expected"),
        ("a.jsonl.gz", b"nothing zipped", "broken gzip stream"),
        ("a.jsonl.gz", gzip.compress(ENGLISH.encode(), mtime=0)[:-20], "broken gzip stream"),
    ],
)
def test_unusable_files_are_refused_by_name(
    tmp_path: Path, tiny_tokenizer: Any, name: str, content: str | bytes, message: str
) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as refused:
        calibration_tokens(tiny_tokenizer, path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_file_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        calibration_tokens(tiny_tokenizer, tmp_path / "none.txt")


def test_another_script_is_remarked_on(tmp_path: Path, tiny_tokenizer: Any, notices: list[str]) -> None:
    thai = "ตลาดเช้าริมคลองเปิดตั้งแต่ตีห้า แม่ค้าพายเรือมาขายผักและขนม " * 40
    calibration_tokens(tiny_tokenizer, _write(tmp_path / "th.txt", thai))
    assert any("Thai letters" in each for each in notices)


def test_text_in_single_bytes_is_remarked_on(tmp_path: Path, tiny_tokenizer: Any, notices: list[str]) -> None:
    calibration_tokens(tiny_tokenizer, _write(tmp_path / "a.txt", "𐎠𐎡𐎢𐎣 " * 200))
    assert any("of its tokens are single bytes" in each for each in notices)


def test_chinese_or_english_alone_is_not(tmp_path: Path, tiny_tokenizer: Any, notices: list[str]) -> None:
    chinese = "磨坊主打开水闸，大轮子慢慢转了起来。" * 60
    calibration_tokens(tiny_tokenizer, _write(tmp_path / "zh.txt", chinese))
    calibration_tokens(tiny_tokenizer, _write(tmp_path / "en.txt", ENGLISH))
    assert not any("letters" in each for each in notices)


def test_parity_text_is_in_many_scripts_and_short_for_large_models(tiny_tokenizer: Any) -> None:
    rows = parity_tokens(tiny_tokenizer, 10**6)
    assert rows.shape[1] == 128
    few = parity_tokens(tiny_tokenizer, 7 * 10**9)
    assert few.numel() == 256
    scripts = text._scripts(text._parity_text())
    assert {"CJK", "LATIN", "CYRILLIC", "HIRAGANA", "HANGUL", "ARABIC", "DEVANAGARI"} <= set(scripts)


def test_the_package_has_calibration_text_of_all_languages(tiny_tokenizer: Any) -> None:
    folder = Path(text.__file__).parents[1] / "assets" / "calibration"
    assert (folder / "text.jsonl.gz").stat().st_size <= 300_000
    records = [
        json.loads(line) for line in gzip.decompress((folder / "text.jsonl.gz").read_bytes()).splitlines()
    ]
    assert len({record["lang"] for record in records} - {"code"}) == 41
    few = {record["lang"] for record in records[: text.LARGE_CALIBRATION_TOKENS // text._LENGTH]}
    assert few == {record["lang"] for record in records}  # that large models are calibrated on
    licences = (folder / "LICENSE.md").read_text(encoding="utf-8")
    assert all(f"`{record['source']}`" in licences or record["lang"] == "code" for record in records)
    longest = max(len(record["text"]) for record in records if record["lang"] != "code")
    assert longest <= 1500
    # The text on which parity is measured is not calibrated on.
    joined = "\n".join(record["text"] for record in records)
    assert not any(passage in joined for passage in text._parity_text().split("\n") if len(passage) > 40)


def test_the_packages_text_is_shorter_for_large_models(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "CALIBRATION_TOKENS", 16_384)
    monkeypatch.setattr(text, "_calibration_texts", lambda: ["short", *[ENGLISH] * 40, ENGLISH[1000:]])
    assert text.default_calibration(tiny_tokenizer, 10**6).shape == (128, 128)
    assert text.default_calibration(tiny_tokenizer, 7 * 10**9).shape == (64, 128)


def test_every_packaged_text_contributes_before_any_contributes_twice(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [ENGLISH, ENGLISH[1000:]]
    monkeypatch.setattr(text, "_calibration_texts", lambda: texts)
    ids = [tiny_tokenizer.encode(each) for each in texts]
    rows = text.default_calibration(tiny_tokenizer, 10**6).tolist()
    assert rows[:3] == [ids[0][:128], ids[1][:128], ids[0][128:256]]


def test_the_text_for_loading_is_short(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_calibration_texts", lambda: [ENGLISH] * 40)
    assert text.loading_calibration(tiny_tokenizer).shape == (4, 128)
