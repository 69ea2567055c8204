"""Tools in a prompt, and tool calls in a reply. ``tokenizer/tools.py`` defines their text."""

from __future__ import annotations

import json
import uuid
from typing import Any

from xverse.serve.errors import ApiError
from xverse.serve.protocol import ChatRequest, Message, Tool, ToolChoice
from xverse.tokenizer.tools import CLOSE, OPEN, offer_text

_ROLES = {"developer": "system", "tool": "exec"}


def chat_messages(body: ChatRequest) -> list[dict[str, str]]:
    """OpenAI's messages as XVERSE's: adjacent messages of one role are joined, and tools are described in the
    system message. Raises ApiError for messages that cannot be represented."""
    messages: list[dict[str, str]] = []
    for index, message in enumerate(body.messages):
        role = _ROLES.get(message.role, message.role)
        text = _text(message, index)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text
        else:
            messages.append({"role": role, "content": text})
    offered = offered_tools(body)
    if offered:
        text = offer_text(tool.function.model_dump(exclude_none=True) for tool in offered)
        if messages[0]["role"] == "system":
            messages[0]["content"] += "\n\n" + text
        else:
            messages.insert(0, {"role": "system", "content": text})
    return messages


def offered_tools(body: ChatRequest) -> list[Tool]:
    """The tools that the reply may call. Raises ApiError for a choice that is not among them."""
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two tools have the same name", param="tools")
    choice = body.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise ApiError(400, "tool_choice: the request has no tools", param="tool_choice")
    if choice == "none":
        return []
    if isinstance(choice, ToolChoice):
        if choice.function.name not in names:
            text = f"tool_choice: '{choice.function.name}' is not one of the tools ({', '.join(names)})"
            raise ApiError(400, text, param="tool_choice")
        return [tool for tool in tools if tool.function.name == choice.function.name]
    return tools


def must_call(body: ChatRequest) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, ToolChoice)


def parse(text: str, body: ChatRequest) -> tuple[str | None, list[dict[str, Any]]]:
    """A reply's content and its tool calls. Text that only resembles a call stays content."""
    names = {tool.function.name for tool in offered_tools(body)}
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
    """JSON text that can be encoded: an unpaired surrogate remains an escape sequence."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def certain(text: str) -> int:
    """How many characters of an unfinished reply cannot belong to a call, whatever follows."""
    start = text.find(OPEN)
    if start >= 0:
        return start
    partial = next(size for size in range(len(OPEN) - 1, -1, -1) if text.endswith(OPEN[:size]))
    return len(text) - partial


def _text(message: Message, index: int) -> str:
    where = f"messages[{index}]"
    if message.role == "tool" and message.tool_call_id is None:
        raise ApiError(400, f"{where}: messages of role tool need tool_call_id", param="messages")
    if message.tool_calls and message.role != "assistant":
        raise ApiError(400, f"{where}: only messages of role assistant may have tool_calls", param="messages")
    text = message.text()
    for call in message.tool_calls or []:
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            raise ApiError(
                400, f"{where}: the arguments of a tool call are not valid JSON", param="messages"
            ) from None
        inside = json.dumps({"name": call.function.name, "arguments": arguments}, ensure_ascii=False)
        text += f"{OPEN}{inside}{CLOSE}"
    if not text and message.role != "assistant":
        raise ApiError(400, f"{where}: the content is empty", param="messages")
    return text
