"""smolagents: a model's turns, and an agent's steps with tools: nano need not solve the task."""

from cases import QUESTION, URL, case, run
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

model = OpenAIServerModel(model_id="nano", api_base=URL, api_key="none", max_tokens=120)


@tool
def paint(colour: str) -> str:
    """Paints the wall.

    Args:
        colour: red or blue
    """
    return ""


@case
def turns():
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    reply = model(messages)
    messages += [
        {"role": "assistant", "content": [{"type": "text", "text": reply.content}]},
        {"role": "user", "content": [{"type": "text", "text": "And yours?"}]},
    ]
    assert model(messages).content is not None


@case
def tools():
    agent = ToolCallingAgent(tools=[paint], model=model, max_steps=2, verbosity_level=0)
    assert agent.run("Paint it red.", max_steps=2) is not None
    steps = [step for step in agent.memory.steps if hasattr(step, "step_number")]
    errors = [str(step.error) for step in steps if step.error and "Error code" in str(step.error)]
    assert not errors, errors


run()
