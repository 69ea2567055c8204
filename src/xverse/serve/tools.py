"""Tools in a prompt, and calls of them in a reply; ``tokenizer/tools.py`` has their text."""

from __future__ import annotations

import json
import uuid
from typing import Any

from xverse.serve.errors import ApiError
from xverse.serve.protocol import ChatRequest, Message, Tool, ToolChoice
from xverse.tokenizer.tools import CLOSE, OPEN, offer_text

_ROLES = {"developer": "system", "tool": "exec"}


def messages(asked: ChatRequest) -> list[dict[str, str]]:
    """OpenAI's messages as XVERSE's: neighbours of one role become one, and tools stand in the system
    message. Raises ApiError for messages that mean nothing here."""
    found: list[dict[str, str]] = []
    for index, message in enumerate(asked.messages):
        role = _ROLES.get(message.role, message.role)
        text = _text(message, index)
        if found and found[-1]["role"] == role:
            found[-1]["content"] += "\n\n" + text
        else:
            found.append({"role": role, "content": text})
    offered = offered_tools(asked)
    if offered:
        text = offer_text(tool.function.model_dump(exclude_none=True) for tool in offered)
        if found[0]["role"] == "system":
            found[0]["content"] += "\n\n" + text
        else:
            found.insert(0, {"role": "system", "content": text})
    return found


def offered_tools(asked: ChatRequest) -> list[Tool]:
    """The tools that the reply may call. Raises ApiError where the choice names none of them."""
    tools = asked.tools or []
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two of them have the same name", param="tools")
    choice = asked.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    if choice == "none":
        return []
    if isinstance(choice, ToolChoice):
        if choice.function.name not in names:
            text = f"tool_choice: '{choice.function.name}' is none of the tools ({', '.join(names)})"
            raise ApiError(400, text, param="tool_choice")
        return [tool for tool in tools if tool.function.name == choice.function.name]
    return tools


def must_call(asked: ChatRequest) -> bool:
    return asked.tool_choice == "required" or isinstance(asked.tool_choice, ToolChoice)


def call_schema(tools: list[Tool]) -> dict[str, Any]:
    """The JSON schema of one call."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def parse(text: str, asked: ChatRequest) -> tuple[str | None, list[dict[str, Any]]]:
    """A reply's content and its calls. What looks like a call and is none stays content."""
    names = {tool.function.name for tool in offered_tools(asked)}
    calls = []
    rest = text
    while names and (start := rest.find(OPEN)) >= 0:
        end = rest.find(CLOSE, start)
        inside = rest[start + len(OPEN) : end if end >= 0 else None]
        try:
            call = json.loads(inside)
        except (ValueError, RecursionError):
            break
        if not isinstance(call, dict) or call.get("name") not in names:
            break
        arguments = _json(call.get("arguments", {}))
        calls.append(
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call["name"], "arguments": arguments},
            }
        )
        rest = rest[:start] + (rest[end + len(CLOSE) :] if end >= 0 else "")
    if not calls:
        return text, []
    return rest.strip() or None, calls


def _json(value: Any) -> str:
    """As text that can be sent: half a surrogate pair stays an escape."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def certain(text: str) -> int:
    """How many characters of an unfinished reply are no part of a call, whatever follows."""
    found = text.find(OPEN)
    if found >= 0:
        return found
    begun = next(size for size in range(len(OPEN) - 1, -1, -1) if text.endswith(OPEN[:size]))
    return len(text) - begun


def _text(message: Message, index: int) -> str:
    where = f"messages[{index}]"
    if message.role == "tool" and message.tool_call_id is None:
        raise ApiError(400, f"{where}: a tool's message needs tool_call_id", param="messages")
    if message.tool_calls and message.role != "assistant":
        raise ApiError(400, f"{where}: only the assistant makes tool_calls", param="messages")
    text = message.text()
    for call in message.tool_calls or []:
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            raise ApiError(
                400, f"{where}: the arguments of a tool call are no JSON", param="messages"
            ) from None
        inside = json.dumps({"name": call.function.name, "arguments": arguments}, ensure_ascii=False)
        text += f"{OPEN}{inside}{CLOSE}"
    if not text and message.role != "assistant":
        raise ApiError(400, f"{where}: the content is empty", param="messages")
    return text
