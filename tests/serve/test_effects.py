"""Fields of vLLM and of OpenAI's older API that have an effect, and what replies contain."""

from __future__ import annotations

import json
from typing import Any

import pytest

QUESTION: list[Any] = [{"role": "user", "content": "What is your name?"}]
CHAT = "/v1/chat/completions"
COLOURS = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "paint", "parameters": COLOURS}}


def post(server: Any, path: str = CHAT, **body: Any) -> dict[str, Any]:
    if path == CHAT:
        body = {"messages": QUESTION, "temperature": 0, "max_tokens": 60, **body}
    with server.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def said(server: Any, **body: Any) -> str:
    text: str = post(server, **body)["choices"][0]["message"]["content"]
    return text


def test_ends(server: Any) -> None:
    whole = post(server, return_token_ids=True)
    (choice,) = whole["choices"]
    ids = choice["token_ids"]
    assert choice["finish_reason"] == "stop"
    assert ids[-1] == 3
    stopped = post(server, stop_token_ids=[ids[2]], return_token_ids=True)["choices"][0]
    assert stopped["token_ids"] == ids[:3]
    assert stopped["finish_reason"] == "stop"
    longer = post(server, min_tokens=len(ids) + 3, return_token_ids=True)["choices"][0]
    assert len(longer["token_ids"]) >= len(ids) + 3
    assert longer["token_ids"][: len(ids) - 1] == ids[:-1]
    endless = post(server, ignore_eos=True, return_token_ids=True)["choices"][0]
    assert endless["finish_reason"] == "length"
    assert len(endless["token_ids"]) == 60
    shown = post(server, ignore_eos=True, skip_special_tokens=False)["choices"][0]["message"]["content"]
    assert "<|endoftext|>" in shown
    assert "<|endoftext|>" not in endless["message"]["content"]
    assert (
        len(
            post(server, max_tokens=1, max_completion_tokens=2, ignore_eos=True, return_token_ids=True)[
                "choices"
            ][0]["token_ids"]
        )
        == 2
    )


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(
    "form",
    [
        {"guided_choice": ["red", 'a "b"\n']},
        {"guided_regex": 'red|a "b"\n'},
        {"guided_grammar": 'start: "red" | "blue"'},
        {"guided_grammar": 'root ::= "red" | "blue"'},
        {"guided_json": {"enum": ["red"]}},
        {"guided_json": '{"enum": ["red"]}'},
        {"structured_outputs": {"choice": ["red"]}},
        {"structured_outputs": {"json": {"enum": ["red"]}, "regex": None}},
        {"response_format": {"type": "regex", "regex": "red"}},
        {"response_format": {"type": "json_object", "schema": {"enum": ["red"]}}},
    ],
)
def test_constraints(server: Any, path: str, form: dict[str, Any]) -> None:
    body = {"messages": QUESTION} if path == CHAT else {"prompt": "A colour: "}
    choice = post(server, path, temperature=0, max_tokens=20, **body, **form)["choices"][0]
    text = choice["text"] if path != CHAT else choice["message"]["content"]
    assert text in ("red", '"red"', "blue", 'a "b"\n')


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"guided_regex": "(("}, "guided_regex"),
        ({"guided_grammar": "::= x"}, "guided_grammar"),
        ({"guided_grammar": "nonsense"}, "guided_grammar"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex"),
    ],
)
def test_wrong_constraints(server: Any, form: dict[str, Any], param: str) -> None:
    with server.client() as client:
        answer = client.post(CHAT, json={"messages": QUESTION, **form})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_reply_is_continued(server: Any) -> None:
    whole = post(server, return_token_ids=True, repetition_penalty=1)["choices"][0]["token_ids"]
    begun = server.service.tokenizer.decode(whole[:5])
    assert server.service.tokenizer.encode(begun) == whole[:5]
    messages = [*QUESTION, {"role": "assistant", "content": begun}]
    rest = said(server, messages=messages, continue_final_message=True, repetition_penalty=1)
    assert begun + rest == server.service.tokenizer.decode(whole)


def test_an_empty_prompt_begins_a_text(server: Any) -> None:
    for prompt in ("", [""], [[]], [2]):
        answer = post(server, "/v1/completions", prompt=prompt, max_tokens=3)
        assert answer["usage"]["prompt_tokens"] == 1


def test_seeds(server: Any) -> None:
    for seed in (-5, 2**62, 2**63 - 1, -(2**63), 2**64 - 1, 10**30):
        assert len({said(server, temperature=2, seed=seed, max_tokens=5) for _ in range(2)}) == 1
    assert len({said(server, temperature=5, top_k=-1, top_p=1, seed=-1) for _ in range(4)}) > 1


def test_what_replies_contain(server: Any) -> None:
    first, second = post(server), post(server)
    assert first["system_fingerprint"] == second["system_fingerprint"]
    assert first["choices"][0]["message"]["refusal"] is None
    long = [{"role": "user", "content": "word " * 200}]
    post(server, messages=long, max_tokens=1)
    used = post(server, messages=long, max_tokens=1)["usage"]
    assert 64 <= used["prompt_tokens_details"]["cached_tokens"] < used["prompt_tokens"]


def streamed(server: Any, **body: Any) -> list[dict[str, Any]]:
    with server.client() as client:
        text = client.post(CHAT, json={"messages": QUESTION, "stream": True, **body}).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_usage_and_ids_in_every_chunk(server: Any) -> None:
    chunks = streamed(
        server, max_tokens=4, stream_options={"continuous_usage_stats": True}, return_token_ids=True
    )
    assert all("usage" in chunk for chunk in chunks)
    assert chunks[0]["prompt_token_ids"]
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert len(ids) == chunks[-1]["usage"]["completion_tokens"] == 4


NAMED = {"type": "function", "function": {"name": "paint"}}
CHOICES = [
    "required",
    NAMED,
    {"type": "function", "name": "paint"},
    {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_calls_arrive_in_pieces(server: Any, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    tools = [TOOL] if choice == "required" else [TOOL, other]
    chunks = streamed(server, tools=tools, tool_choice=choice, max_tokens=50, seed=1)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert len(calls) > 2
    assert [call.get("id") is not None for call in calls] == [True] + [False] * (len(calls) - 1)
    assert calls[0]["function"]["name"] == "paint"
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments)["colour"] in ("red", "blue")
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert all(not delta.get("content") for delta in deltas)


def test_a_call_that_is_cut_off(server: Any) -> None:
    for limit in range(4, 22, 3):
        asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "max_tokens": limit, "seed": 1}
        (choice,) = post(server, **asked)["choices"]
        calls = choice["message"].get("tool_calls", [])
        assert "<tool_call>" not in (choice["message"]["content"] or "")
        chunks = streamed(server, **asked, temperature=0)
        pieces = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
        assert "".join(piece["function"]["arguments"] for piece in pieces) == "".join(
            call["function"]["arguments"] for call in calls
        )
        assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
        if choice["finish_reason"] == "length" and calls:
            with pytest.raises(json.JSONDecodeError):
                json.loads(calls[0]["function"]["arguments"])


def test_a_call_that_a_stop_text_cuts(server: Any) -> None:
    """It is a partial call, and the reply ended at the text, not because of a call."""
    whole = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60, "temperature": 0}
    for stop, arguments in (("colour", '{"'), ('"}', ...), ("arguments", ""), ("</tool_call>", None)):
        (choice,) = post(server, **whole, stop=stop)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == ("tool_calls" if arguments is None else "stop"), stop
        if isinstance(arguments, str):
            assert call["function"]["arguments"] == arguments
        chunks = streamed(server, **whole, stop=stop)
        assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    asked = {
        "model": "nano",
        "messages": QUESTION,
        "max_tokens": 60,
        "temperature": 0,
        "tool_choice": {"type": "any"},
    }
    tool = {"name": "paint", "input_schema": COLOURS}
    reply = post(server, "/v1/messages", **asked, tools=[tool], stop_sequences=["colour"])
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "colour")


def test_functions_are_the_former_tools(server: Any) -> None:
    client = server.openai()
    asked: dict[str, Any] = {
        "model": "nano", "messages": QUESTION, "functions": [TOOL["function"]],
        "function_call": {"name": "paint"}, "max_tokens": 50, "seed": 1,
    }  # fmt: skip
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call.name == "paint"
    assert json.loads(choice.message.function_call.arguments)["colour"] in ("red", "blue")
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    calls = [delta.function_call for delta in deltas if delta.function_call]
    assert calls[0].name == "paint"
    assert "".join(call.arguments for call in calls) == choice.message.function_call.arguments


def test_replies_go_back_as_they_came(server: Any) -> None:
    """As agent loops send them: the object, and its dump with all its nulls."""
    client = server.openai()
    called = client.chat.completions.create(
        model="nano", messages=QUESTION, tools=[TOOL], tool_choice="required", max_tokens=50, seed=1
    ).choices[0]
    (call,) = called.message.tool_calls
    for message in (called.message, called.message.model_dump(), called.message.to_dict()):
        result = {"role": "tool", "tool_call_id": call.id, "content": ""}
        again = client.chat.completions.create(
            model="nano", messages=[*QUESTION, message, result], tools=[TOOL], max_tokens=5
        )
        assert again.choices[0].finish_reason
