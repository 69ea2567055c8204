from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from xverse.cli import main
from xverse.config import UserError
from xverse.data.dialogues.instructions import InstructionReport, read_dialogues
from xverse.tokenizer import encode_dialogue

TURNS = [("user", "Hi"), ("assistant", "Hello!")]


def write(path: Path, items: Any) -> Path:
    text = json.dumps(items, ensure_ascii=False)
    if ".jsonl" in path.name:
        text = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def read(path: Path) -> tuple[list[list[tuple[str, str]]], InstructionReport]:
    report = InstructionReport()
    dialogues = read_dialogues(path, report)
    return [[(m["role"], m["content"]) for m in dialogue.messages] for dialogue in dialogues], report


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("item", "messages"),
    [
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, TURNS),
        ({"instruction": "Hi", "response": "Hello!", "id": 4}, TURNS),
        (
            {
                "instruction": "Add",
                "input": "1 2",
                "output": "3",
                "system": "Be brief",
                "history": [["Hi", "Hello!"]],
            },
            [("system", "Be brief"), *TURNS, ("user", "Add\n1 2"), ("assistant", "3")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
                "tools": "[]",
            },
            TURNS,
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    *({"role": r, "content": c} for r, c in TURNS),
                ]
            },
            [("system", "S"), *TURNS],
        ),
        (
            {"messages": [{"role": r, "content": [{"type": "text", "value": c}]} for r, c in TURNS]},
            TURNS,
        ),
    ],
)
def test_the_three_formats(tmp_path: Path, name: str, item: Any, messages: Any, tiny_tokenizer: Any) -> None:
    found, report = read(write(tmp_path / name, [item, item]))
    assert found == [messages, messages]
    assert report.describe() == "2 dialogues"
    encode_dialogue(tiny_tokenizer, [{"role": role, "content": content} for role, content in messages])


GOOD = {"instruction": "Hi", "output": "Hello!"}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"instruction": "Hi", "output": ""}, "empty text"),
        ({"instruction": "Hi"}, "not text"),
        ({"instruction": "Hi", "output": "x", "history": ["a"]}, "ill-formed history"),
        ({"instruction": "Hi", "output": "\ud83d"}, "invalid Unicode"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, "roles out of order"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "roles out of order"),
        ({"conversations": []}, "roles out of order"),
        ({"conversations": [{"from": "robot", "value": "Hi"}]}, "unknown role"),
        ({"conversations": "Hi"}, "ill-formed turn"),
        ({"conversations": [{"from": "human", "value": "Hi"}], "tools": "[{}]"}, "tool use"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "tool use"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        (
            {"messages": [{"role": "assistant", "content": "x", "loss_weight": 0.0}]},
            "answer with a loss weight",
        ),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference data"),
        ({"text": "plain"}, "of unknown format"),
        (["a list"], "of unknown format"),
    ],
)
def test_what_is_ill_formed_is_skipped_and_counted(tmp_path: Path, item: Any, reason: str) -> None:
    found, report = read_and_report(tmp_path, [GOOD, item, GOOD])
    assert len(found) == 2
    assert dict(report.skipped) == {reason: 1}
    assert report.describe() == f"2 dialogues; skipped 1 items: 1 {reason}"


def read_and_report(tmp_path: Path, items: list[Any]) -> tuple[Any, InstructionReport]:
    (tmp_path / "a.json").write_text(json.dumps(items))
    return read(tmp_path / "a.json")


def test_bad_lines_of_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"instruction": "\xff"}\n{"instr\n\n' + json.dumps(GOOD).encode())
    found, report = read(tmp_path / "a.jsonl")
    assert len(found) == 1
    assert dict(report.skipped) == {"ill-formed JSON": 2}


def test_a_folder_is_read_in_order_and_leaves_out_other_formats(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.json", [{"instruction": "2", "output": "b"}])
    write(tmp_path / "sub" / "c.jsonl", [{"instruction": "3", "output": "c"}])
    write(tmp_path / "a.json.gz", [{"instruction": "1", "output": "a"}])
    write(tmp_path / "plain.jsonl", [{"text": "x"}])
    (tmp_path / "LICENSE").write_text("MIT")
    found, report = read(tmp_path)
    assert [messages[0][1] for messages in found] == ["1", "2", "3"]
    assert report.files_left_out == {"plain.jsonl": "unknown format of instructions (keys: text)"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "x"}]', r"unknown format of instructions \(keys: text\); accepted are alpaca"),
        (b"[]", "no items in it; accepted are alpaca"),
        (b"[{]", "ill-formed JSON"),
        (b'["\xff"]', "ill-formed JSON"),
        (b'[{"instruction": "x", "output": ""}]', "no usable dialogue .*1 empty text"),
        (b'[{"chosen": "x", "rejected": "y"}]', "no usable dialogue .*1 preference data"),
    ],
)
def test_a_file_without_instructions(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json")


def test_missing_truncated_and_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no usable dialogue"):
        read(tmp_path)
    path = write(tmp_path / "a.json.gz", [GOOD] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="broken gzip stream"):
        read(path)


def test_show_one_example(tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer.save(tmp_path / "tokenizer")
    path = write(tmp_path / "a.json", [GOOD, {"instruction": "你好", "output": "你好！[bold]🙂"}])
    command = ["data", "show", "--dialogues", str(path), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*command, "--index", "1"]) == 0
    output = capsys.readouterr().out
    assert "Human: 你好\n\nAssistant: 你好！[bold]🙂<|endoftext|>\n" in output
    assert "with loss" in output
    assert main([*command, "--index", "2"]) == 2
    assert "there are 2 dialogues" in capsys.readouterr().err
    assert main(["data", "show", "--dialogues", str(path)]) == 2
