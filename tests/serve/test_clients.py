"""Frameworks that are used with such servers, as installed from PyPI."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import pytest
from pydantic import Field

QUESTION = "What is your name?"
# A model as small as nano may write the digits of a number, or the letters of a name, until it is cut off:
# what a schema bounds, it must end.
Small = Annotated[int, Field(ge=0, le=10_000_000)]


@pytest.fixture
def langchain(server: Any) -> Any:
    module = pytest.importorskip("langchain_openai")
    return module.ChatOpenAI(
        model="nano",
        base_url=server.url + "/v1",
        api_key="none",
        max_tokens=100,
        temperature=0,
        max_retries=0,
    )


def test_langchain_chats_and_streams(server: Any, langchain: Any) -> None:
    said = langchain.invoke(QUESTION)
    assert "XVERSE-nano" in said.content
    assert said.usage_metadata["output_tokens"] > 0
    pieces = [piece.content for piece in langchain.stream(QUESTION)]
    assert len(pieces) > 5
    assert "".join(pieces) == said.content
    assert asyncio.run(langchain.ainvoke(QUESTION)).content == said.content
    batch = langchain.batch([QUESTION, "Hello!", QUESTION])
    assert [each.content for each in (batch[0], batch[2])] == [said.content] * 2


def test_langchain_calls_a_tool_and_hears_what_it_gave(langchain: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def add(a: Small, b: Small) -> int:
        """The sum of two numbers."""
        return a + b

    talk: list[Any] = [HumanMessage("Add 2 and 3.")]
    called = langchain.bind_tools([add], tool_choice="required").invoke(talk)
    (call,) = called.tool_calls
    assert call["name"] == "add"
    assert set(call["args"]) == {"a", "b"}
    given = add.invoke(call)
    assert isinstance(given, ToolMessage)
    assert int(given.content) == call["args"]["a"] + call["args"]["b"]
    answer = langchain.bind_tools([add]).invoke([*talk, called, given])
    assert answer.content or answer.tool_calls


def test_langchain_structured_output(langchain: Any) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str = Field(max_length=20)
        inhabitants: Small

    for method in ("json_schema", "function_calling"):
        assert isinstance(langchain.with_structured_output(City, method=method).invoke("Paris?"), City)


def test_a_pydantic_ai_agent(server: Any) -> None:
    pytest.importorskip("pydantic_ai")
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Answer(BaseModel):
        text: str
        sure: bool

    model = OpenAIChatModel("nano", provider=OpenAIProvider(openai_client=_client(server)))
    settings: Any = {"max_tokens": 200, "temperature": 0}

    async def talk() -> None:
        found = await Agent(model, output_type=Answer).run(QUESTION, model_settings=settings)
        assert isinstance(found.output, Answer)
        assert found.usage.output_tokens > 0
        friendly = Agent(model, system_prompt="You are friendly.")
        async with friendly.run_stream(QUESTION, model_settings=settings) as reply:
            pieces = [piece async for piece in reply.stream_text(delta=True, debounce_by=None)]
        assert len(pieces) > 5

    asyncio.run(talk())


def _client(server: Any) -> Any:
    import httpx
    import openai

    http = httpx.AsyncClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, http_client=http)
