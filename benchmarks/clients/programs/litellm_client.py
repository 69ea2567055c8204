"""litellm: its reply objects sent back, tools, streaming, dropped parameters."""

import litellm
from cases import QUESTION, URL, case, run

PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
        },
    },
}


def ask(messages, **options):
    return litellm.completion(
        model="openai/nano", api_base=URL, api_key="none", messages=messages, max_tokens=40, **options
    )


@case
def turns():
    messages = [{"role": "user", "content": QUESTION}]
    for _ in range(3):
        messages.append(ask(messages).choices[0].message)
        messages.append({"role": "user", "content": "And yours?"})


@case
def tools():
    messages = [{"role": "user", "content": "Paint it red."}]
    reply = ask(messages, tools=[PAINT], tool_choice="required").choices[0].message
    messages += [
        reply,
        {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "name": "paint", "content": ""},
    ]
    assert ask(messages, tools=[PAINT])


@case
def streaming():
    chunks = list(
        ask([{"role": "user", "content": QUESTION}], stream=True, stream_options={"include_usage": True})
    )
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content


@case
def structured():
    schema = PAINT["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": schema, "strict": True}}
    assert (
        "colour"
        in ask([{"role": "user", "content": QUESTION}], response_format=form).choices[0].message.content
    )


@case
def dropped_parameters():
    assert ask([{"role": "user", "content": QUESTION}], reasoning_effort="low", drop_params=True)


run()
