"""Datasets for fine-tuning, described as LLaMA-Factory describes them in ``dataset_info.json``.

An entry names where a dataset lies, its format and its columns:

alpaca     columns prompt (instruction), query (input), response (output), history, system, tools
sharegpt   a list of turns in the column messages (conversations); tags name the keys and roles in it.
           OpenAI's messages are this format with the tags of role and content.

Preference data (``ranking``) have columns chosen and rejected; continued pretraining reads the column prompt
as plain text. Keys: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from xverse.config import UserError
from xverse.data.dialogues.instructions import Dialogue, Skip, as_list, checked, text_message
from xverse.tokenizer.tools import call_text, offer_text


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns; None where the format's own name holds, if there is one."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Keys of a turn and names of its roles, in sharegpt."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One entry of ``dataset_info.json``."""

    file_name: str | None = None
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    om_hub_url: str | None = None
    script_url: str | None = None
    cloud_file_name: str | None = None
    file_sha1: str | None = None
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    formatting: Literal["alpaca", "sharegpt"] = "alpaca"
    ranking: bool = False
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)


@dataclass
class Preference:
    """A conversation that ends with the user, and two answers to it."""

    messages: list[dict[str, str]]
    chosen: str
    rejected: str


OPENAI_TAGS = Tags(
    role_tag="role",
    content_tag="content",
    user_tag="user",
    assistant_tag="assistant",
    observation_tag="tool",
    function_tag="function",
)


def guess(item: Any, where: str) -> DatasetInfo:
    """The description of a file without an entry, from the keys of its first item.

    Raises UserError, listing the keys, where they are of no known format.
    """
    keys = list(item) if isinstance(item, dict) else []
    ranking = "chosen" in keys and "rejected" in keys
    extra = Columns(
        system="system" if "system" in keys else None,
        tools="tools" if "tools" in keys else None,
        history="history" if "history" in keys else None,
        messages=next((key for key in ("messages", "conversations") if key in keys), None),
        prompt=next((key for key in ("instruction", "prompt", "text") if key in keys), None),
        response=next((key for key in ("output", "response") if key in keys), None),
    )
    if extra.messages is not None:
        turns = item[extra.messages]
        openai = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
        tags = OPENAI_TAGS if openai else Tags()
        return DatasetInfo(formatting="sharegpt", ranking=ranking, columns=extra, tags=tags)
    if extra.prompt is not None:
        return DatasetInfo(ranking=ranking, columns=extra)
    raise UserError(
        f"{where}: unknown format (keys: {', '.join(map(str, keys)) or 'none'}); accepted are alpaca "
        "(instruction, input, output), sharegpt (conversations), messages (role, content), text"
    )


def check_columns(item: Any, info: DatasetInfo, stage: str, where: str) -> None:
    """Raises UserError where a column that ``info`` needs is not in ``item``; lists those that are."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected objects, found {type(item).__name__}")
    columns = info.columns
    needed = [
        columns.system,
        columns.tools,
        columns.history,
    ]
    if info.formatting == "sharegpt":
        needed.append(columns.messages or "conversations")
    else:
        needed.append(columns.prompt or "instruction")
        if stage == "sft":
            needed.append(columns.response or "output")
    if stage == "dpo":
        needed += [columns.chosen or "chosen", columns.rejected or "rejected"]
    for name in needed:
        if name is not None and name not in item:
            raise UserError(f"{where}: no column '{name}' (there are: {', '.join(map(str, item))})")


def to_text(item: dict[str, Any], info: DatasetInfo) -> str:
    """The plain text of an item, for continued pretraining. Raises Skip for an unusable one."""
    return text_message("user", item.get(info.columns.prompt or "instruction"))["content"]


def to_dialogue(item: Any, info: DatasetInfo) -> Dialogue:
    """Messages that ``encode_dialogue`` accepts. Raises Skip, with the reason, for an unusable item."""
    messages = _messages(item, info)
    if info.formatting == "alpaca":
        messages.append(text_message("assistant", item.get(info.columns.response or "output")))
    return Dialogue(checked(messages))


def to_preference(item: Any, info: DatasetInfo) -> Preference:
    """A prompt with its two answers. Raises Skip, with the reason, for an unusable item."""
    messages = _messages(item, info)
    answers = []
    for name in (info.columns.chosen or "chosen", info.columns.rejected or "rejected"):
        answer = item.get(name)
        if isinstance(answer, list) and answer:  # whole conversations: only their ends differ
            answer = answer[-1]
        if isinstance(answer, dict):
            answer = answer.get(info.tags.content_tag)
        answers.append(text_message("assistant", answer)["content"])
    checked([*messages, text_message("assistant", answers[0])])
    if answers[0] == answers[1]:
        raise Skip("chosen and rejected alike")
    return Preference(messages, *answers)


def _messages(item: Any, info: DatasetInfo) -> list[dict[str, str]]:
    """System message with the tools, then the turns; in alpaca up to the last question."""
    if not isinstance(item, dict):
        raise Skip("not an object")
    columns = info.columns
    if any(name and item.get(name) for name in (columns.images, columns.videos, columns.audios)):
        raise Skip("with images, videos or audio")
    turns = _sharegpt(item, info) if info.formatting == "sharegpt" else _alpaca(item, info)
    system = item.get(columns.system) if columns.system else None
    parts = [system] if system else []
    if turns and turns[0]["role"] == "system":
        parts = [turns.pop(0)["content"]]
    if columns.tools and item.get(columns.tools) not in (None, "", "[]", []):
        parts.append(offer_text(_functions(item[columns.tools])))
    if parts:
        turns.insert(0, text_message("system", "\n\n".join(parts) if all(map(_text, parts)) else None))
    return turns


def _alpaca(item: dict[str, Any], info: DatasetInfo) -> list[dict[str, str]]:
    columns = info.columns
    messages = []
    for pair in as_list((item.get(columns.history) if columns.history else None) or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Skip("ill-formed history")
        messages += [text_message("user", pair[0]), text_message("assistant", pair[1])]
    parts: list[Any] = [item.get(columns.prompt or "instruction"), item.get(columns.query or "input") or ""]
    if not all(map(_text, parts)):
        raise Skip("not text")
    return [*messages, text_message("user", "\n".join(part for part in parts if part.strip()))]


def _sharegpt(item: dict[str, Any], info: DatasetInfo) -> list[dict[str, str]]:
    tags = info.tags
    roles = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.system_tag: "system",
        tags.observation_tag: "exec",
        tags.function_tag: "assistant",
    }
    messages: list[dict[str, str]] = []
    for turn in as_list(item.get(info.columns.messages or "conversations")):
        if not isinstance(turn, dict):
            raise Skip("ill-formed turn")
        if turn.get(tags.role_tag) not in roles:
            raise Skip("unknown role")
        role = roles[turn[tags.role_tag]]
        content = turn.get(tags.content_tag)
        calls = turn.get("tool_calls")
        if calls:
            written = [_call(call) for call in as_list(calls)]
            content = "\n".join([content, *written] if isinstance(content, str) and content else written)
        elif turn[tags.role_tag] == tags.function_tag:
            content = _calls(content)
        message = text_message(role, content)
        if role == "exec" and messages and messages[-1]["role"] == "exec":
            messages[-1]["content"] += "\n\n" + message["content"]  # results of calls made at once
        else:
            messages.append(message)
    return messages


def _calls(content: Any) -> str:
    try:
        calls = json.loads(content)
    except (TypeError, ValueError):
        raise Skip("ill-formed tool call") from None
    return "\n".join(_call(call) for call in (calls if isinstance(calls, list) else [calls]))


def _call(call: Any) -> str:
    """One call: ``{"name", "arguments"}``, or OpenAI's with a ``function`` around it."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Skip("ill-formed tool call")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI sends them as JSON inside JSON
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise Skip("ill-formed tool call") from None
    return call_text(call["name"], arguments)


def _functions(tools: Any) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise Skip("ill-formed tools") from None
    found = []
    for tool in as_list(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Skip("ill-formed tools")
        found.append(function)
    return found


def _text(value: Any) -> bool:
    return isinstance(value, str)
