"""LangChain's ChatOpenAI and a LangGraph agent whose tool prints nothing."""

from typing import Literal

from cases import QUESTION, URL, case, run
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from pydantic import BaseModel

model = ChatOpenAI(model="nano", base_url=URL, api_key="none", max_tokens=60, max_retries=0)


@tool
def paint(colour: Literal["red", "blue"]) -> str:
    """Paints the wall."""
    return ""


class Wall(BaseModel):
    colour: Literal["red", "blue"]


@case
def turns():
    messages = [SystemMessage(""), HumanMessage(QUESTION)]
    for _ in range(3):
        messages += [model.invoke(messages), HumanMessage("And yours?")]
    assert model.invoke([AIMessage("Hello!"), *messages[2:], SystemMessage("Be brief.")]).content is not None
    window = trim_messages(messages, max_tokens=4, token_counter=len, strategy="last")
    assert model.invoke(window).content is not None


@case
def streaming():
    assert "".join(piece.content for piece in model.stream(QUESTION))


@case
def tools():
    """The graph of LangGraph's agents: model, tool, model."""
    forced, free = model.bind_tools([paint], tool_choice="required"), model.bind_tools([paint])

    def answer(state: MessagesState):
        heard = any(isinstance(message, ToolMessage) for message in state["messages"])
        return {"messages": [(free if heard else forced).invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", answer)
    graph.add_node("tools", ToolNode([paint]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", lambda state: "tools" if len(state["messages"]) == 2 else END)
    graph.add_edge("tools", "model")
    found = graph.compile().invoke({"messages": [HumanMessage("Paint it red.")]})["messages"]
    assert [message.type for message in found] == ["human", "ai", "tool", "ai"]
    assert found[2].content == ""


@case
def structured():
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Wall, method=method).invoke(QUESTION), Wall)


@case
def fields():
    other = ChatOpenAI(
        model="nano", base_url=URL, api_key="none", max_tokens=5, reasoning_effort="low", service_tier="auto"
    )
    assert other.invoke(QUESTION)


run()
