"""Errors as responses: in OpenAI's shape, or in that of the API whose route was called (``dialects.py``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from xverse.config import UserError, nearest
from xverse.serve.access_log import current
from xverse.serve.dialects import kind_of, shaped, with_field_names
from xverse.serve.runner import Busy, Draining

_FIELD = re.compile(r"[\w.\[\]]+(?=: )")
_MOST = 1000  # characters of a message, which may repeat what the client has sent


class ApiError(Exception):
    """Answered with HTTP ``status``; ``param`` is the offending field, by default the one before the
    message's colon."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        field = _FIELD.match(message) if status < 500 else None
        self.status, self.param = status, param or (field[0] if field else None)
        self.code = code or ("invalid_value" if status == 400 and self.param else None)


def as_api_error(error: Exception) -> ApiError:
    """What clients get for an error."""
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(429, str(error), code="queue_full")
        case Draining():
            return ApiError(503, str(error), code="shutting_down")
        case UserError():
            return ApiError(400, str(error))
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error, in the form and with the field names of the API that was called."""
    record = current()
    record.fail(status, code or kind_of(status))
    message = message if len(message) <= _MOST else message[:_MOST] + "…"
    message = with_field_names(record.field_names, message)
    param = param and with_field_names(record.field_names, param)
    return shaped(record.path, status, message, param, code, record.id)


def answer(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(body(status, message, param, code), status_code=status, headers=headers)


_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "10"}}


async def on_error(request: Request, error: Exception) -> JSONResponse:
    known = as_api_error(error)
    return answer(known.status, str(known), known.param, known.code, _HEADERS.get(known.status))


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Report the first error, with the path of its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return answer(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if isinstance(first.get("input"), bytes):
        text = "send the body as JSON with the header Content-Type: application/json"
        return answer(415, text, code="unsupported_content_type")
    return await on_error(request, of_validation(first))


def of_validation(error: Mapping[str, Any]) -> ApiError:
    """One of pydantic's errors in the API's words, with the field's path as clients write it."""
    path, ctx = "", error.get("ctx", {})
    parts = error["loc"]
    for part in parts[1:] if parts[:1] in (("body",), ("query",)) and parts[1:] else parts:
        if part != "body" and part != "[key]":
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    path = (path + ctx.get("at", "")).removeprefix(".")
    text = _rule(error, ctx) if path or error["type"] != "missing" else "is empty; send a JSON object"
    code = _BY_RULE.get(text.partition(";")[0])
    return ApiError(400, f"{path or 'the body'}: {text}", param=path or None, code=code)


def _rule(error: Mapping[str, Any], ctx: Mapping[str, Any]) -> str:
    """What the field must be."""
    kind = error["type"]
    if kind == "rule":
        return str(ctx["text"])
    if kind == "literal_error":
        value = error["input"]
        hint = nearest(value, re.findall(r"'([^']*)'", ctx["expected"])) if isinstance(value, str) else ""
        return f"must be {ctx['expected']}{hint}"
    for suffix, text in _RULES.items():
        if kind.endswith(suffix):
            return text.format(**ctx)
    return "the value is not valid"


_BY_RULE = {"required field is missing": "missing_field", "unknown field": "unknown_field"}
# By the last part of pydantic's error types.
_RULES = {
    "missing": "required field is missing",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "attributes_type": "must be an object",
    "too_long": "{actual_length} items are too many; the limit is {max_length}",
    "string_too_short": "must not be empty",
    "too_short": "at least {min_length} item is needed",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "pattern_mismatch": "must have 1 to 64 letters, digits, underscores or dashes",
}


_CODES = {404: "unknown_path", 405: "method_not_allowed", 408: "request_timeout", 413: "body_too_large"}


async def on_http(request: Request, error: Exception) -> JSONResponse:
    """Also errors of routing: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path, status, text = request.url.path, error.status_code, str(error.detail)
    code, headers = _CODES.get(status), dict(error.headers or {})
    if status == 404:
        text = f"{path} does not exist"
        plain = re.sub("/+", "/", path).rstrip("/").lower()
        for meant in (plain, f"/v1{plain}", plain.replace("/v1/v1/", "/v1/")):
            if meant != path and methods(request, meant):
                hint = " (the base URL of clients ends in /v1)" if "/v1" in meant else ""
                text += f"; use {meant}{hint}"
                break
    elif status == 405:
        allowed = methods(request, path)
        text = f"{path} does not accept {request.method}, only {', '.join(allowed)}"
        headers["Allow"] = ", ".join(allowed)
    elif status == 400 and isinstance(error.__cause__, ValueError | RecursionError):  # of reading the body
        code, text = "invalid_json", "the body is nested too deeply, or has a number of too many digits"
        if isinstance(error.__cause__, UnicodeDecodeError):
            text = "the body is not valid JSON: it is not encoded in UTF-8"
    return answer(status, text, code=code, headers=headers)


def methods(request: Request, path: str) -> list[str]:
    """The methods of the routes at ``path``; none: it does not exist. Those of unknown paths do not count."""
    routes = [each for each in request.app.routes if isinstance(each, APIRoute) and each.name != "unknown"]
    found = {method for each in routes if each.path_regex.fullmatch(path) for method in each.methods or ()}
    return sorted({*found, *(("HEAD",) if "GET" in found else ())})


HANDLERS = {
    **dict.fromkeys((Exception, ApiError, UserError, Busy, Draining), on_error),
    RequestValidationError: on_invalid,
    HTTPException: on_http,
}
