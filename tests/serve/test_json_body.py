"""JSON that Python reads and others do not write: halves of surrogate pairs, NaN, numbers beyond a double."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xverse.serve import json_body

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"title": "t"}}}
# A body of every route that takes one, with texts in many places.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER, "tools": [TOOL], "stop": "s", "model": "nano", "user": "u",
                             "guided_choice": ["a"], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "guided_regex": "a", "user": "u", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "instructions": "i", "metadata": {"k": "v"}, "user": "u",
                      "max_output_tokens": 1},
    "/v1/messages": {"model": "nano", "messages": USER, "system": "s", "stop_sequences": ["x"],
                     "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": "nano", "messages": USER, "system": "s"},
    "/api/chat": {"model": "nano", "messages": USER, "options": {"num_predict": 1, "stop": ["s"]}},
    "/api/generate": {"model": "nano", "prompt": "Hi", "system": "s", "options": {"num_predict": 1}},
    "/api/embed": {"model": "nano", "input": ["Hi"]},
    "/api/show": {"model": "nano"},
    "/v1/embeddings": {"input": "Hi", "user": "u"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "q", "documents": ["d"], "return_documents": True},
    "/tokenize": {"prompt": "Hi", "return_token_strs": True},
}  # fmt: skip


def spoilt(value: Any, wrong: str) -> list[Any]:
    """Copies in which one text, or a name, begins with ``wrong``."""
    if isinstance(value, str):
        return [wrong + value]
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    copies: list[Any] = [{**value, wrong: 1}] if isinstance(value, dict) else []
    for key, part in inside:
        for copy in spoilt(part, wrong):
            copies.append(
                {**value, key: copy} if isinstance(value, dict) else [*value[:key], copy, *value[key + 1 :]]
            )
    return copies


@pytest.mark.parametrize("path", BODIES)
def test_halves_of_surrogate_pairs_never_fail(server: Any, path: str) -> None:
    with server.client() as client:
        for body in spoilt(BODIES[path], "\ud800"):
            answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            assert "\\ud800" not in answer.text


@pytest.mark.parametrize("path", BODIES)
def test_numbers_that_are_not_json_are_refused(server: Any, path: str) -> None:
    with server.client() as client:
        for number in ("NaN", "-Infinity", "1e400"):
            text = json.dumps({**BODIES[path], "user": 0})[:-2] + number + "}"
            answer = client.post(path, content=text, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400
            assert number in answer.text


def test_reading() -> None:
    assert json_body.read(b'{"a": "\\ud83d\\ude00 \\ud83d"}') == {"a": "😀 \ufffd"}
    assert json_body.read('{"ä": 1.5}'.encode("utf-16")) == {"ä": 1.5}
    assert json_body.read(b'["\xed\xa0\x80"]') == ["\ufffd"]
    assert json_body.read(b'"\\\\ud800"') == "\\ud800"


def test_other_encodings_are_named(server: Any) -> None:
    with server.client() as client:
        answer = client.post("/tokenize", content='{"prompt": "ä"}'.encode("latin-1"),
                             headers={"Content-Type": "application/json"})  # fmt: skip
        assert (answer.status_code, "not encoded in UTF-8" in answer.text) == (400, True)
        empty = client.post("/tokenize", content=b"", headers={"Content-Type": "application/json"})
        assert "the body: is empty; send a JSON object" in empty.text
