"""llm, Simon Willison's command line: a conversation, options, a schema, a tool."""

import os
from pathlib import Path

from cases import QUESTION, URL, case, command, run

home = Path.home() / "llm"
home.mkdir(exist_ok=True)
os.environ["LLM_USER_PATH"] = str(home)
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: nano\n  model_name: nano\n  api_base: {URL}\n"
    "  supports_schema: true\n  supports_tools: true\n"
)
LIMIT = ("-m", "nano", "-o", "max_tokens", "60")


@case
def turns():
    assert command("llm", *LIMIT, QUESTION).strip()
    assert command("llm", "-c", "And yours?", "-o", "max_tokens", "20").strip()


@case
def options():
    assert command(
        "llm", *LIMIT, "-o", "temperature", "0", "-o", "seed", "1", "--no-stream", QUESTION
    ).strip()


@case
def structured():
    schema = '{"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}'
    assert "colour" in command("llm", *LIMIT, "--schema", schema, QUESTION)


@case
def tools():
    command("llm", *LIMIT, "-T", "llm_version", "Which version is it?")


run()
