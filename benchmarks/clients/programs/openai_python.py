"""The openai package: chat with its own replies sent back, streaming, tools, structured output."""

import enum
import json

import openai
import pydantic
from cases import QUESTION, URL, case, run

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Paint(pydantic.BaseModel):
    """Paints the wall."""

    colour: Colour


@case
def turns():
    messages = [{"role": "user", "content": QUESTION}]
    for send in (
        lambda message: message,
        lambda message: message.model_dump(),
        lambda message: message.to_dict(),
    ):
        reply = client.chat.completions.create(model="nano", messages=messages, max_tokens=20)
        messages += [send(reply.choices[0].message), {"role": "user", "content": "And yours?"}]
    assert reply._request_id
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0


@case
def streaming():
    options = {"include_usage": True, "include_obfuscation": False}
    with client.chat.completions.stream(
        model="nano",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=200,
        temperature=0,
        stream_options=options,
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(pieces) == stream.get_final_completion().choices[0].message.content


@case
def tools():
    tool = openai.pydantic_function_tool(Paint)
    messages = [{"role": "user", "content": "Paint it red."}]
    for choice in ("required", {"type": "function", "function": {"name": "Paint"}}):
        reply = client.chat.completions.create(
            model="nano", messages=messages, tools=[tool], tool_choice=choice, max_tokens=60
        )
        (call,) = reply.choices[0].message.tool_calls
        Paint.model_validate_json(call.function.arguments)
        messages += [reply.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": ""}]
    assert client.chat.completions.create(model="nano", messages=messages, tools=[tool], max_tokens=20)


@case
def streamed_tools():
    """Put together by hand and sent back with ``index``, as agent loops do."""
    call = {}
    stream = client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": "Paint it red."}],
        tools=[openai.pydantic_function_tool(Paint)],
        tool_choice="required",
        max_tokens=60,
        stream=True,
    )
    for chunk in stream:
        for piece in chunk.choices[0].delta.tool_calls or []:
            if piece.id:
                call = piece.model_dump()
            else:
                call["function"]["arguments"] += piece.function.arguments
    json.loads(call["function"]["arguments"])
    messages = [
        {"role": "user", "content": "Paint it red."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "done"},
    ]
    assert client.chat.completions.create(model="nano", messages=messages, max_tokens=10)


@case
def structured():
    reply = client.chat.completions.parse(
        model="nano", messages=[{"role": "user", "content": QUESTION}], response_format=Paint, max_tokens=100
    )
    assert isinstance(reply.choices[0].message.parsed, Paint)


@case
def all_fields():
    assert client.chat.completions.create(
        model="nano",
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        max_completion_tokens=5,
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        reasoning_effort="low",
        verbosity="low",
        safety_identifier="me",
        prompt_cache_key="k",
        parallel_tool_calls=True,
        user="u",
        modalities=["text"],
        prediction={"type": "content", "content": "x"},
    )


run()
