"""Tools as text: how a prompt offers them and how a reply calls one.

XVERSE has no format of its own for them. The tools stand in the system message, one JSON object a line, and a
call is ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, as several open models write it. The server
and fine-tuning use the same text, so that a model calls as it has learnt to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OFFER = "You can call these tools:"
_HOW = f'To call one, answer with {OPEN}{{"name": NAME, "arguments": OBJECT}}{CLOSE} and nothing else.'


def offer_text(functions: Iterable[Mapping[str, Any]]) -> str:
    """What the system message says of ``functions``, each with name, description and parameters."""
    return "\n".join([_OFFER, *(json.dumps(function) for function in functions), _HOW])


def call_text(name: str, arguments: Any) -> str:
    """A call as the assistant writes it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{OPEN}{call}{CLOSE}"
