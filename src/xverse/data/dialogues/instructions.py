"""Reading instruction data for fine-tuning: alpaca, sharegpt and messages, as JSON or JSON lines.

alpaca     {"instruction", "input", "output"} and optionally "system", "history": [[question, answer], …]
sharegpt   {"conversations": [{"from": "human" | "gpt" | "system", "value"}, …]} and optionally "system"
messages   {"messages": [{"role": "user" | "assistant" | "system", "content"}, …]}
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.tokenizer.chat import check_messages

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TOOL_ROLES = ("function_call", "observation", "tool", "function", "exec")
PREFERENCE_KEYS = ("chosen", "rejected", "chosen_messages", "rejected_messages", "label", "kto_tag")
ACCEPTED = (
    "alpaca (instruction, input, output), sharegpt (conversations of from, value), messages (role, content)"
)


@dataclass
class Dialogue:
    """One example: ``{"role", "content"}`` messages, as ``encode_dialogue`` accepts them."""

    messages: list[dict[str, str]]


@dataclass
class InstructionReport:
    """How many items became dialogues, why others did not, and which files of a folder were left out."""

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    files_left_out: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """One line, such as ``990 dialogues; skipped 10 items: 8 empty text, 2 tool use``."""
        text = f"{self.read} dialogues"
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
            text += f"; skipped {self.skipped.total()} items: {reasons}"
        if self.files_left_out:
            text += "; left out " + ", ".join(f"{name} ({why})" for name, why in self.files_left_out.items())
        return text


class Skip(Exception):
    """An item that is no usable dialogue; the text is the reason that the report counts."""


def read_dialogues(path: str | Path, report: InstructionReport) -> list[Dialogue]:
    """The dialogues of a file, or of every JSON file in a folder and below it, in name order.

    Items that are ill-formed are skipped and counted in ``report``; so is tool use and preference data,
    which are not plain dialogues. In a folder, files of another format are left out and named in
    ``report``. Raises UserError for a missing or unreadable path, for a file whose format is unknown, and
    where nothing usable is found.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of instructions")
    if not path.is_dir():
        dialogues = _read_file(path, report)
    else:
        dialogues = []
        for file in sorted(
            item for item in path.rglob("*") if item.is_file() and item.name.endswith(SUFFIXES)
        ):
            try:
                dialogues += _read_file(file, report)
            except _UnknownFormat as error:
                report.files_left_out[str(file.relative_to(path))] = error.short
    if not dialogues:
        raise UserError(f"{path}: no usable dialogue ({report.describe()}); accepted are {ACCEPTED}")
    return dialogues


class _UnknownFormat(UserError):
    def __init__(self, path: Path, short: str) -> None:
        super().__init__(f"{path}: {short}; accepted are {ACCEPTED}")
        self.short = short


def _read_file(path: Path, report: InstructionReport) -> list[Dialogue]:
    dialogues: list[Dialogue] = []
    skipped: Counter[str] = Counter()
    known, keys = False, ""
    for item in read_items(path, skipped):
        keys = keys or (", ".join(list(item)[:6]) if isinstance(item, dict) else type(item).__name__)
        try:
            messages = _messages(item)
            known = True
            dialogues.append(Dialogue(checked(messages)))
        except Skip as reason:
            known = known or str(reason) != "of unknown format"
            skipped[str(reason)] += 1
    if not known:
        raise _UnknownFormat(
            path, f"unknown format of instructions (keys: {keys})" if keys else "no items in it"
        )
    report.read += len(dialogues)
    report.skipped += skipped
    return dialogues


def read_items(path: Path, skipped: Counter[str]) -> Iterator[Any]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken gzip stream ({str(error).rstrip('.')})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        try:
            yield from json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: ill-formed JSON ({error})") from None
        return
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            skipped["ill-formed JSON"] += 1
            continue
        yield item


def _messages(item: Any) -> list[dict[str, str]]:
    if not isinstance(item, dict):
        raise Skip("of unknown format")
    if any(key in item for key in PREFERENCE_KEYS):
        raise Skip("preference data")
    if item.get("tools") not in (None, "", "[]", []):
        raise Skip("tool use")
    system = [text_message("system", item["system"])] if item.get("system") else []
    if "instruction" in item:
        return system + _alpaca(item)
    if "conversations" in item:
        return system + [_turn(turn, "from", "value") for turn in as_list(item["conversations"])]
    if "messages" in item:
        return system + [_turn(turn, "role", "content") for turn in as_list(item["messages"])]
    raise Skip("of unknown format")


def _alpaca(item: dict[str, Any]) -> list[dict[str, str]]:
    messages = []
    for pair in as_list(item.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Skip("ill-formed history")
        messages += [text_message("user", pair[0]), text_message("assistant", pair[1])]
    question, extra = item["instruction"], item.get("input") or ""
    if not isinstance(question, str) or not isinstance(extra, str):
        raise Skip("not text")
    answer = item.get("output", item.get("response"))  # GPTeacher's name for it
    question = "\n".join(part for part in (question, extra) if part.strip())
    return [*messages, text_message("user", question), text_message("assistant", answer)]


def _turn(turn: Any, role_key: str, text_key: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise Skip("ill-formed turn")
    role = turn.get(role_key)
    if role in TOOL_ROLES or turn.get("tool_calls"):
        raise Skip("tool use")
    if role not in ROLES:
        raise Skip("unknown role")
    if ROLES[role] == "assistant" and turn.get("loss_weight", 1) != 1:
        raise Skip("answer with a loss weight")
    return text_message(ROLES[role], turn.get(text_key))


def text_message(role: str, content: Any) -> dict[str, str]:
    if isinstance(content, list):  # parts, as multimodal formats have them
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Skip("parts that are not text")
        parts = [part.get("text", part.get("value")) for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise Skip("not text")
    if not content.strip():
        raise Skip("empty text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise Skip("invalid Unicode") from None
    return {"role": role, "content": content}


def as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Skip("ill-formed turn")
    return value


def checked(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    try:
        check_messages(messages, last=("assistant",))
    except UserError:
        raise Skip("roles out of order") from None
    return messages
