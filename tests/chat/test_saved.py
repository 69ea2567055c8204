from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xverse.chat.saved import load_conversation, save_conversation
from xverse.config import UserError

MESSAGES = [
    {"role": "system", "content": "简短"},
    {"role": "user", "content": "你好 👋"},
    {"role": "assistant", "content": "مرحبا\n世界"},
]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "对话.json"
    save_conversation(MESSAGES, path)
    save_conversation(MESSAGES[1:], path)  # a conversation may be replaced
    assert load_conversation(path) == MESSAGES[1:]
    assert "你好 👋" in path.read_text(encoding="utf-8")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("precious")
    with pytest.raises(UserError, match="not a conversation"):
        save_conversation(MESSAGES, other)
    assert other.read_text() == "precious"
    with pytest.raises(UserError, match="directory"):
        save_conversation(MESSAGES, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        save_conversation(MESSAGES, tmp_path / ("n" * 300))
    with pytest.raises(UserError, match="no conversation"):
        save_conversation(MESSAGES[:1], tmp_path / "x.json")
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


def file_of(messages: Any, **changes: Any) -> str:
    return json.dumps({"format": "xverse-conversation", "version": 1, "messages": messages, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "invalid JSON"),
        ("[1]", "not a saved conversation"),
        (file_of(MESSAGES, version=2), "version 2"),
        (file_of(MESSAGES, mesages=1), "did you mean 'messages'"),
        ('{"format": "xverse-conversation", "version": 1}', "missing key 'messages'"),
        (file_of([]), "empty"),
        (file_of(5), "expected a list"),
        (file_of(MESSAGES[:2]), "last role must be 'assistant'"),
        (file_of([MESSAGES[1], MESSAGES[1]]), "cannot follow"),
        (file_of([*MESSAGES, MESSAGES[0]]), "system"),
        (file_of([{"role": "usr", "content": "x"}]), "did you mean 'user'"),
        (file_of([{"role": "user", "content": 5}]), "must be text"),
    ],
)
def test_wrong_files_are_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_conversation(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_conversation(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="invalid UTF-8"):
        load_conversation(tmp_path / "b.json")
