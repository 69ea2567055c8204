"""Pydantic AI: turns, a streamed reply, a typed result through a tool and through a schema."""

import enum

from cases import QUESTION, URL, case, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

SETTINGS = {"max_tokens": 100}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Wall(BaseModel):
    colour: Colour


def model():
    return OpenAIChatModel("nano", provider=OpenAIProvider(base_url=URL, api_key="none"))


@case
async def turns():
    agent = Agent(model(), system_prompt="Be brief.")
    first = await agent.run(QUESTION, model_settings=SETTINGS)
    assert (
        await agent.run("And yours?", message_history=first.all_messages(), model_settings=SETTINGS)
    ).output


@case
async def streaming():
    async with Agent(model()).run_stream(QUESTION, model_settings=SETTINGS) as reply:
        assert [piece async for piece in reply.stream_text(delta=True, debounce_by=None)]


@case
async def tools():
    found = await Agent(model(), output_type=Wall).run(QUESTION, model_settings=SETTINGS)
    assert isinstance(found.output, Wall)


@case
async def structured():
    found = await Agent(model(), output_type=NativeOutput(Wall)).run(QUESTION, model_settings=SETTINGS)
    assert isinstance(found.output, Wall)


run()
