"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from xverse.config import UserError
from xverse.serve.access_log import current
from xverse.serve.runner import Busy, Draining


class ApiError(Exception):
    """Answered with HTTP ``status``; ``param`` names the offending field."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    current().fail(status, code or kind)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(body(status, message, param, code), status_code=status, headers=headers)


def of_user_error(error: UserError) -> ApiError:
    """The field is taken from the beginning of the message."""
    text = str(error)
    field, colon, _ = text.partition(":")
    return ApiError(400, text, param=field if colon and field.isidentifier() else None)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return answer(error.status, str(error), error.param, error.code, headers)


async def on_user_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UserError)
    return await on_api_error(request, of_user_error(error))


async def on_busy(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Busy)
    return answer(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})


async def on_draining(request: Request, error: Exception) -> JSONResponse:
    return answer(503, str(error), code="shutting_down", headers={"Retry-After": "10"})


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Report the first error, with the path of its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    # The path contains the names of a union's alternatives, which are not part of the client's field.
    whole = first["type"] in ("extra_forbidden", "missing")  # the last part is the client's own field
    kept = [part for part in path if part.isidentifier() or part.isdigit() or (whole and part is path[-1])]
    field = ".".join(kept)
    if first["type"] == "json_invalid":
        return answer(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return answer(400, f"{field}: unknown field", field, "unknown_field")
    if first["type"] == "missing":
        return answer(400, f"{field or 'body'}: required field is missing", field or None, "missing_field")
    return answer(400, f"{field or 'body'}: {first['msg']}", field or None, "invalid_value")


async def on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = "body_too_large" if error.status_code == 413 else None
    return answer(error.status_code, str(error.detail), code=code, headers=dict(error.headers or {}))


async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    return answer(500, f"the server failed: {type(error).__name__}", code="internal_error")


HANDLERS = {
    Exception: on_unexpected,
    ApiError: on_api_error,
    UserError: on_user_error,
    Busy: on_busy,
    Draining: on_draining,
    RequestValidationError: on_invalid,
    HTTPException: on_http,
}
