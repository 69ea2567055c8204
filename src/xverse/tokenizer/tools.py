"""Tools as text: how a prompt offers them and how a reply calls one.

XVERSE defines no format for tools. The system message lists them, one JSON object per line, and a call is
``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, as in several open models. The server and
fine-tuning share this format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OFFER = "You can call these tools:"
_HOW = f'To call one, answer with {OPEN}{{"name": NAME, "arguments": OBJECT}}{CLOSE} and nothing else.'


def offer_text(functions: Iterable[Mapping[str, Any]]) -> str:
    """The part of the system message that offers ``functions``, each with name, description and
    parameters."""
    described = [json.dumps(function, ensure_ascii=False) for function in functions]
    return "\n".join([_OFFER, *described, _HOW])


def call_text(name: str, arguments: Any) -> str:
    """A tool call as the assistant writes it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{OPEN}{call}{CLOSE}"
