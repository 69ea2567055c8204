"""openai-agents over its default, the Responses API: a tool that must be called, turns, a typed result."""

import enum

from agents import (
    Agent,
    ModelSettings,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from cases import QUESTION, URL, case, run
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)


def connect():
    """Each case runs in an event loop of its own, and so needs its own client."""
    set_default_openai_client(AsyncOpenAI(base_url=URL, api_key="none", max_retries=0), use_for_tracing=False)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Wall(BaseModel):
    colour: Colour


@function_tool
def paint(colour: Colour) -> str:
    """Paints the wall."""
    return ""


@case
async def turns():
    connect()
    agent = Agent(
        name="a",
        instructions="Be brief.",
        model="nano",
        model_settings=ModelSettings(max_tokens=500, temperature=0),
    )
    first = await Runner.run(agent, QUESTION)
    again = [*first.to_input_list(), {"role": "user", "content": "And yours?"}]
    assert (await Runner.run(agent, again)).final_output is not None
    stored = await Runner.run(agent, "And yours?", previous_response_id=first.last_response_id)
    assert stored.final_output is not None


@case
async def tools():
    connect()
    settings = ModelSettings(max_tokens=500, temperature=0, tool_choice="required")
    agent = Agent(name="a", model="nano", tools=[paint], model_settings=settings)
    found = await Runner.run(agent, "Paint it red.", max_turns=5)
    assert any(item.type == "tool_call_output_item" for item in found.new_items)


@case
async def streaming():
    connect()
    agent = Agent(name="a", model="nano", model_settings=ModelSettings(max_tokens=500, temperature=0))
    result = Runner.run_streamed(agent, QUESTION)
    assert [event async for event in result.stream_events()]


@case
async def structured():
    connect()
    agent = Agent(name="a", model="nano", output_type=Wall, model_settings=ModelSettings(max_tokens=500))
    assert isinstance((await Runner.run(agent, QUESTION)).final_output, Wall)


run()
