"""Hundreds of requests that the OpenAPI document allows or forbids: no response may be a 500."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.scale import examples

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = int(os.environ.get("XVERSE_TEST_EXAMPLES", examples(75)))  # of requests to an operation
OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /tokenize",
    "POST /detokenize",
    "GET /health",
    "GET /health/ready",
    "GET /health/live",
    "GET /metrics",
)


@pytest.fixture(scope="module")
def api(server: Any) -> dict[str, Any]:
    """The operations by name."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{each.method.upper()} {each.path}": each for each in found}


def test_none_is_left_out(api: dict[str, Any]) -> None:
    assert set(OPERATIONS) <= set(api)
    assert len(api) > len(OPERATIONS)


CASES = [
    (name, mode)
    for name in OPERATIONS
    for mode in ("POSITIVE", "NEGATIVE")
    if mode == "POSITIVE" or name.startswith("POST")  # the others have no input
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_no_request_makes_it_fail(api: dict[str, Any], name: str, mode: str) -> None:
    seen = statuses(api[name], name, mode, EXAMPLES)
    if mode == "NEGATIVE":
        assert any(400 <= status < 500 for status in seen)
    elif "{" not in name:
        assert 200 in seen


def test_no_request_to_another_api_makes_it_fail(server: Any, api: dict[str, Any]) -> None:
    """All other routes, with fewer requests each."""
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    for name in sorted(api.keys() - set(OPERATIONS)):
        method, path = name.split()
        takes_body = "requestBody" in paths[path][method.lower()]
        for mode in ("POSITIVE", "NEGATIVE") if takes_body else ("POSITIVE",):
            statuses(api[name], name, mode, examples(12))


# The length of the reply is not tested here.
SHORT: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"max_tokens": 2},
    "POST /v1/completions": {"max_tokens": 2},
    "POST /v1/responses": {"max_output_tokens": 2},
    "POST /v1/messages": {"max_tokens": 2},
    "POST /api/chat": {"options": {"num_predict": 2}},
    "POST /api/generate": {"options": {"num_predict": 2}},
}


def statuses(operation: Any, name: str, mode: str, examples: int) -> list[int]:
    """The statuses of generated requests, none of which makes the server fail."""
    seen: list[int] = []

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and name in SHORT:
            case.body = {**case.body, **SHORT[name]}
            if mode == "POSITIVE" and name.endswith("completions"):
                case.body |= _sensible("chat" in name, begun=len(seen) % 2 == 0)
        answer = case.call(timeout=120)
        seen.append(answer.status_code)
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text}"
        if answer.status_code >= 400 and answer.request.method != "HEAD":
            error = answer.json()["error"]
            assert error if isinstance(error, str) else error["message"]

    ask()
    assert seen
    return seen


def _sensible(chat: bool, begun: bool) -> dict[str, Any]:
    """Avoid combinations that the server refuses although the document cannot forbid them."""
    if not chat:
        return {"model": "nano"} if begun else {"model": "nano", "prompt": "Hello"}
    fields: dict[str, Any] = {"model": "nano", "max_completion_tokens": None, "logprobs": True}
    return fields if begun else {**fields, "messages": [{"role": "user", "content": "Hello"}]}
