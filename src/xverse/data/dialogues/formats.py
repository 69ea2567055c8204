"""Formats of fine-tuning data, and items of them as messages.

alpaca     {"instruction", "input", "output"}, optionally "system" and "history": [[question, answer], …]
sharegpt   {"conversations": [{"from": "human" | "gpt" | …, "value"}, …]}, optionally "system" and "tools"
messages   sharegpt with OpenAI's keys and roles: {"messages": [{"role", "content"}, …]}, tool_calls included

Columns and tags can be renamed as in LLaMA-Factory's dataset_info.json
(https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md). Preference data add "chosen" and
"rejected", KTO data a boolean "label"; continued pretraining reads plain text from the column prompt.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from xverse.config import UserError
from xverse.texts import describe_type, encodable
from xverse.tokenizer.chat import check_messages
from xverse.tokenizer.tools import call_text, offer_text

Messages = list[dict[str, str]]
PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns. None means the format's own name, or no such column."""

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


OPENAI_TAGS = Tags(
    role_tag="role",
    content_tag="content",
    user_tag="user",
    assistant_tag="assistant",
    observation_tag="tool",
    function_tag="function",
)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One entry of ``dataset_info.json``. ``om_hub_url`` is a mirror of the other hubs' and not used.

    The formatting ``openai`` is sharegpt with OpenAI's roles and keys, unless ``tags`` and ``columns`` rename
    them.
    """

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
    revision: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)

    @property
    def on_hub(self) -> bool:
        return bool(self.hf_hub_url or self.ms_hub_url)

    def __post_init__(self) -> None:
        if self.formatting == "openai":
            object.__setattr__(self, "formatting", "sharegpt")
            if self.tags == Tags():
                object.__setattr__(self, "tags", OPENAI_TAGS)
            if self.columns.messages is None:
                object.__setattr__(self, "columns", dataclasses.replace(self.columns, messages="messages"))
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples must be positive, not {self.num_samples}")
        for key in ("script_url", "cloud_file_name", "revision"):
            if getattr(self, key):
                raise ValueError(f"{key} is not supported; use file_name, hf_hub_url or ms_hub_url")
        if not self.on_hub:
            if self.om_hub_url:
                raise ValueError("om_hub_url alone is not supported; add hf_hub_url or ms_hub_url")
            for key in ("subset", "folder"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs hf_hub_url or ms_hub_url; name files with file_name")
            if self.split != "train":
                raise ValueError("split needs hf_hub_url or ms_hub_url; name files with file_name")
        elif self.file_sha1:
            raise ValueError("file_sha1 needs file_name without a hub's URL")


@dataclass
class Preference:
    """A conversation that ends with the user, and two replies to it. ``margin``: how much better the first
    one is, for reward models."""

    messages: Messages
    chosen: str
    rejected: str
    margin: float = 0.0


class Skip(Exception):
    """An unusable item; the text is the reason, which callers count."""


def guess(item: Any, where: str) -> DatasetInfo:
    """The description of a file without an entry, from the keys of its first item.

    Raises UserError, listing the keys, for an unknown format.
    """
    keys = list(item) if isinstance(item, dict) else []
    ranking = "chosen" in keys and "rejected" in keys
    turns_in_prompt = "prompt" in keys and isinstance(_listed(item["prompt"]), list)

    def first(*names: str) -> str | None:
        return next((name for name in names if name in keys), None)

    columns = Columns(
        system=first("system"),
        tools=first("tools"),
        history=first("history"),
        messages=first("messages", "conversations", *(["prompt"] if turns_in_prompt else [])),
        prompt=first("instruction", "prompt", "text", "question"),
        response=first("output", "response", "answer", "completion"),
        kto_tag=next(
            (key for key in ("kto_tag", "label") if keys and _truth(item.get(key)) is not None), None
        ),
    )
    if columns.messages is not None:
        turns = _listed(item[columns.messages])
        openai = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
        tags = OPENAI_TAGS if openai else Tags()
        return DatasetInfo(formatting="sharegpt", ranking=ranking, columns=columns, tags=tags)
    if columns.prompt is not None:
        return DatasetInfo(ranking=ranking, columns=columns)
    raise UserError(
        f"{where}: unknown format (keys: {', '.join(map(str, keys)) or 'none'}); accepted are alpaca "
        "(instruction, input, output), sharegpt (conversations), messages (role, content), text"
    )


def check_columns(item: Any, info: DatasetInfo, stage: str, where: str) -> None:
    """Raise UserError if the first item lacks a column that ``info`` names, or does not suit the stage."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected objects, found {type(item).__name__}")
    columns = info.columns
    needed = [columns.system, columns.tools, columns.history, columns.kto_tag]
    if info.formatting == "sharegpt":
        needed.append(columns.messages or "conversations")
    else:
        needed.append(columns.prompt or "instruction")
        if stage in ("sft", "kto") and not info.ranking:
            needed.append(columns.response or "output")
    if stage in ("dpo", "rm") and _both_replies(item, info) is None:
        needed += [columns.chosen or "chosen", columns.rejected or "rejected"]
    for name in needed:
        if name is not None and name not in item:
            raise UserError(f"{where}: no column '{name}' (columns: {', '.join(map(str, item))})")
    if stage in ("sft", "kto") and info.ranking:
        raise UserError(f"{where}: preference pairs (ranking) need stage dpo or rm")
    if stage == "kto" and columns.kto_tag is None:
        raise UserError(f'{where}: stage kto needs a column that tags replies; its entry lacks "kto_tag"')
    if stage in ("dpo", "rm") and not info.ranking:
        raise UserError(f'{where}: stage {stage} needs preference pairs; its entry lacks "ranking": true')


def is_undesirable(item: dict[str, Any], info: DatasetInfo) -> bool:
    """Whether KTO data tags the item's reply as undesirable."""
    return info.columns.kto_tag is not None and _truth(item.get(info.columns.kto_tag)) is False


def _truth(value: Any) -> bool | None:
    """A boolean, which CSV can only write as text; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def to_text(item: Any, info: DatasetInfo) -> str:
    """The plain text of an item, for continued pretraining. Raises Skip for an unusable one."""
    if not isinstance(item, dict):
        raise Skip("not an object")
    return _message("user", item.get(info.columns.prompt or "instruction"))["content"]


def to_dialogue(item: Any, info: DatasetInfo) -> Messages:
    """Messages that ``encode_dialogue`` accepts. Raises Skip, with the reason, for an unusable item."""
    messages = _messages(item, info)
    if info.formatting == "alpaca":
        messages.append(_message("assistant", item.get(info.columns.response or "output")))
    return _checked(messages)


def to_prompt(item: Any, info: DatasetInfo) -> tuple[Messages, Any]:
    """A conversation up to the user's last turn, and the reply that the item has to it, or None. Raises Skip,
    with the reason, for an unusable item."""
    messages, reply = _messages(item, info), None
    if info.formatting == "alpaca":
        reply = item.get(info.columns.response or "output")
    elif messages and messages[-1]["role"] == "assistant":
        reply = messages.pop()["content"]
    try:
        check_messages(messages, last=("user", "exec"))
    except UserError:
        raise Skip("roles out of order") from None
    return messages, reply


def to_preference(item: Any, info: DatasetInfo) -> Preference:
    """A prompt with its two replies. Raises Skip, with the reason, for an unusable item."""
    messages = _messages(item, info)
    replies = []
    names = info.columns.chosen or "chosen", info.columns.rejected or "rejected"
    for reply in _both_replies(item, info) or [item.get(name) for name in names]:
        if isinstance(reply, list) and reply:  # whole conversations that differ in their last turn
            reply = reply[-1]
        if isinstance(reply, dict):
            reply = reply.get(info.tags.content_tag)
        replies.append(_message("assistant", reply)["content"])
    _checked([*messages, _message("assistant", replies[0])])
    if replies[0] == replies[1]:
        raise Skip("chosen and rejected alike")
    margin = item.get("margin")
    if isinstance(margin, str):  # CSV
        try:
            margin = float(margin)
        except ValueError:
            raise Skip("margin is not a number") from None
    if margin is not None and (not isinstance(margin, (int, float)) or isinstance(margin, bool)):
        raise Skip("margin is not a number")
    return Preference(messages, replies[0], replies[1], margin or 0.0)


def _both_replies(item: dict[str, Any], info: DatasetInfo) -> list[Any] | None:
    """Two replies in one column, the better one first, as LLaMA-Factory's first versions had them."""
    if info.columns.chosen or "chosen" in item:
        return None
    both = _listed(item.get(info.columns.response or "output"))
    return both if isinstance(both, list) and len(both) == 2 else None


def fill_placeholders(text: str, values: Mapping[str, str], unfilled: set[str]) -> str:
    """``text`` with ``{{key}}`` replaced by its value; the keys without one are added to ``unfilled``."""

    def replace(match: re.Match[str]) -> str:
        if match[1] not in values:
            unfilled.add(match[1])
        return values.get(match[1], match[0])

    return PLACEHOLDER.sub(replace, text)


def _messages(item: Any, info: DatasetInfo) -> Messages:
    """A system message with the tools, then the turns; in alpaca up to the last question."""
    if not isinstance(item, dict):
        raise Skip("not an object")
    columns = info.columns
    if any(name and item.get(name) for name in (columns.images, columns.videos, columns.audios)):
        raise Skip("with images, videos or audio")
    turns = _sharegpt(item, info) if info.formatting == "sharegpt" else _alpaca(item, info)
    system = item.get(columns.system) if columns.system else None
    parts = [] if system in (None, "") else [system]
    if turns and turns[0]["role"] == "system":
        parts = [turns.pop(0)["content"]]
    if columns.tools and item.get(columns.tools) not in (None, "", "[]", []):
        parts.append(offer_text(_functions(item[columns.tools])))
    if parts:
        turns.insert(0, _message("system", "\n\n".join(_text("system", part) for part in parts)))
    return turns


def _alpaca(item: dict[str, Any], info: DatasetInfo) -> Messages:
    columns = info.columns
    messages = []
    for pair in _list((item.get(columns.history) if columns.history else None) or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Skip("ill-formed history")
        messages += [_message("user", pair[0]), _message("assistant", pair[1])]
    question, extra = item.get(columns.prompt or "instruction"), item.get(columns.query or "input")
    parts = [_text("user", part) for part in (question, "" if extra is None else extra)]
    return [*messages, _message("user", "\n".join(part for part in parts if part.strip()))]


def _sharegpt(item: dict[str, Any], info: DatasetInfo) -> Messages:
    tags = info.tags
    roles = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.system_tag: "system",
        tags.observation_tag: "exec",
        tags.function_tag: "assistant",
    }
    messages: Messages = []
    for turn in _list(item.get(info.columns.messages or "conversations")):
        if not isinstance(turn, dict):
            raise Skip("ill-formed turn")
        if turn.get(tags.role_tag) not in roles:
            raise Skip("unknown role")
        role = roles[turn[tags.role_tag]]
        if role == "assistant" and turn.get("loss_weight", 1) != 1:
            raise Skip("reply with a loss weight")
        content = turn.get(tags.content_tag)
        calls = turn.get("tool_calls")
        if calls:
            written = [_call(call) for call in _list(calls)]
            content = "\n".join([content, *written] if isinstance(content, str) and content else written)
        elif turn[tags.role_tag] == tags.function_tag:
            calls = _parsed(content, "ill-formed tool call")
            content = "\n".join(_call(call) for call in (calls if isinstance(calls, list) else [calls]))
        message = _message(role, content)
        if role == "exec" and messages and messages[-1]["role"] == "exec":
            messages[-1]["content"] += "\n\n" + message["content"]  # results of simultaneous calls
        else:
            messages.append(message)
    return messages


def _call(call: Any) -> str:
    """One call: ``{"name", "arguments"}``, or OpenAI's with a ``function`` around it."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Skip("ill-formed tool call")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's are JSON inside JSON
        arguments = _parsed(arguments, "ill-formed tool call")
    return call_text(call["name"], arguments)


def _parsed(text: Any, problem: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise Skip(problem) from None


def _functions(tools: Any) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        tools = _parsed(tools, "ill-formed tools")
    functions = []
    for tool in _list(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Skip("ill-formed tools")
        functions.append(function)
    return functions


def _message(role: str, content: Any) -> dict[str, str]:
    if isinstance(content, list):  # parts, as in multimodal formats
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Skip("parts that are not text")
        parts = [part.get("text", part.get("value")) for part in content]
        content = "".join(_text(role, part) for part in parts)
    content = _text(role, content)
    if not content.strip():
        raise Skip("empty text")
    if not encodable(content):
        raise Skip("invalid Unicode")
    return {"role": role, "content": content}


def _text(role: str, value: Any) -> str:
    """Numbers are not written as text: 1.0 and 1e5 would no longer be what the file has."""
    if not isinstance(value, str):
        raise Skip(f"not text ({role}: {describe_type(value)})")
    return value


def _list(value: Any) -> list[Any]:
    value = _listed(value)
    if not isinstance(value, list):
        raise Skip("ill-formed turn")
    return value


def _listed(value: Any) -> Any:
    """A list, which CSV can only hold as JSON; other values as they are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _checked(messages: Messages) -> Messages:
    try:
        check_messages(messages, last=("assistant",))
    except UserError:
        raise Skip("roles out of order") from None
    return messages
