"""Conversations and tools of a request as XVERSE's messages. ``tokenizer/tools.py`` defines the text."""

from __future__ import annotations

import json

from xverse.serve.errors import ApiError
from xverse.serve.protocol import ChatRequest, FunctionCall, Message, Tool
from xverse.tokenizer.tools import CLOSE, OPEN, call_text, offer_text

_ROLES = {"developer": "system", "tool": "exec", "function": "exec"}


def chat_messages(messages: list[Message], offered: list[Tool]) -> list[dict[str, str]]:
    """OpenAI's messages as XVERSE's: adjacent messages of one role are joined, and ``offered`` tools are
    described in the system message."""
    written: list[dict[str, str]] = []
    for message in messages:
        role, text = _ROLES.get(message.role, message.role), _text(message)
        if written and written[-1]["role"] == role:
            written[-1]["content"] = "\n\n".join(filter(None, (written[-1]["content"], text)))
        else:
            written.append({"role": role, "content": text})
    if offered:
        text = tools_text(offered)
        if written[0]["role"] == "system":
            written[0]["content"] = "\n\n".join(filter(None, (written[0]["content"], text)))
        else:
            written.insert(0, {"role": "system", "content": text})
    return written


def tools_text(offered: list[Tool]) -> str:
    """What the system message says about tools: the fields that the client set."""
    return offer_text(tool.function.model_dump(exclude_unset=True) for tool in offered)


def offered_tools(body: ChatRequest) -> list[Tool]:
    """The tools that the reply may call. Raises ApiError for a choice that is not among them."""
    tools, choice = body.all_tools(), body.choice()
    names = [tool.function.name for tool in tools]
    field = "function_call" if body.tool_choice is None and body.function_call is not None else "tool_choice"
    if body.tools and body.functions:
        raise ApiError(400, "functions: is the former name of tools; use one of them")
    for index, name in enumerate(names):
        if name in names[:index]:
            field = f"tools[{index}].function.name" if body.tools else f"functions[{index}].name"
            raise ApiError(400, f"{field}: '{name}' is the name of an earlier tool, too")
    if choice.mode == "none":
        return []
    for name in choice.names or ():
        if name not in names:
            text = f"{field}: '{name}' is not one of the tools ({', '.join(names) or 'there are none'})"
            raise ApiError(400, text)
    offered = [tool for tool in tools if choice.names is None or tool.function.name in choice.names]
    if choice.mode == "required" and not offered:
        raise ApiError(400, f"{field}: there are no tools to call")
    return offered


def _text(message: Message) -> str:
    calls = message.calls() if message.role == "assistant" else []
    return message.text() + "".join(map(_call, calls))


def _call(call: FunctionCall) -> str:
    """A call of an earlier turn. Arguments that are not JSON are written as they are: they were said."""
    try:
        return call_text(call.name, json.loads(call.arguments or "{}"))
    except (ValueError, RecursionError):
        name = json.dumps(call.name, ensure_ascii=False)
        return f'{OPEN}{{"name": {name}, "arguments": {call.arguments}}}{CLOSE}'
