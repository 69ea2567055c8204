"""The body of an error in the form of the API whose path was requested."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_OPENAI_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
Shape = Callable[[int, str, str | None, str | None, str], dict[str, Any]]


def kind_of(status: int) -> str:
    """OpenAI's type of an error."""
    return _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def shaped(
    path: str, status: int, message: str, param: str | None, code: str | None, request_id: str
) -> dict[str, Any]:
    """The body; ``param`` is the offending field."""
    for begin, shape in _SHAPES:
        if path == begin or path.startswith(begin + "/"):
            return shape(status, message, param, code, request_id)
    return _openai(status, message, param, code, request_id)


def with_field_names(field_names: Mapping[str, str], text: str) -> str:
    """``text`` with the names of one API's fields in place of another's."""
    if not field_names:
        return text
    names = "|".join(map(re.escape, sorted(field_names, key=len, reverse=True)))
    return re.sub(rf"(?<![\w.'])({names})(?![\w'])", lambda match: field_names[match[1]], text)


def _openai(status: int, message: str, param: str | None, code: str | None, _: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind_of(status), "param": param, "code": code}}


def _anthropic(status: int, message: str, _: str | None, __: str | None, request_id: str) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def _ollama(status: int, message: str, *_: str | None) -> dict[str, Any]:
    return {"error": message}


# By the beginning of the path.
_SHAPES: tuple[tuple[str, Shape], ...] = (("/v1/messages", _anthropic), ("/api", _ollama))
