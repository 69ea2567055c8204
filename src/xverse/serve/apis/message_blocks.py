"""The bodies of ``/v1/messages``: content blocks, tools, and the request itself."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, StrictBool, StrictStr, model_validator

from xverse.engine.sampling_params import MOST_STOPS
from xverse.serve.errors import ApiError
from xverse.serve.fields import Body, Lenient, Options, by_type, rule
from xverse.serve.protocol import (
    OF_TOOLS,
    ChatRequest,
    Function,
    FunctionCall,
    Message,
    Number,
    Tool,
    ToolCall,
    ToolChoice,
    ToolName,
    Whole,
    tools_of,
)
from xverse.serve.structures import JsonSchema, ResponseFormat

# Fields that cannot change a reply here; docs/api.md lists them.
WITHOUT_EFFECT = frozenset(
    {
        *("metadata", "service_tier", "thinking", "cache_control", "context_management", "container"),
        *("inference_geo", "speed", "betas", "diagnostics", "workspace_id", "user_profile_id"),
    }
)


class TextBlock(Lenient):
    type: Literal["text"] = "text"
    text: StrictStr


class ToolUseBlock(Lenient):
    type: Literal["tool_use"]
    name: StrictStr
    input: dict[str, Any] = Field(default_factory=dict)


_TEXT_ONLY: dict[str, type[Lenient] | None] = {"text": TextBlock}


def _text(value: Any) -> str:
    """The text of a system prompt or of a tool's result."""
    if isinstance(value, str):
        return value
    return "".join(block.text for block in by_type(value, _TEXT_ONLY, _type, "content blocks", "text or "))


def _type(block: dict[str, Any]) -> Any:
    return block.get("type") or ("text" if "text" in block else None)


Text = Annotated[str, PlainValidator(_text, json_schema_input_type=StrictStr | list[dict[str, Any]])]


class ToolResultBlock(Lenient):
    type: Literal["tool_result"]
    content: Text = ""
    is_error: StrictBool = False


_BLOCKS: dict[str, type[Lenient] | None] = {
    "text": TextBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
    "thinking": None,  # of another model; this one does not read it
    "redacted_thinking": None,
}
Block = TextBlock | ToolUseBlock | ToolResultBlock


def _blocks(value: Any) -> list[Block]:
    if isinstance(value, str):
        return [TextBlock(text=value)]
    return by_type(value, _BLOCKS, _type, "content blocks", "text or ")


class Turn(Lenient):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[Block], PlainValidator(_blocks, json_schema_input_type=StrictStr | list[dict[str, Any]])
    ] = Field(default_factory=list)


class MessageTool(Options):
    without_effect: ClassVar[frozenset[str]] = OF_TOOLS

    type: Literal["custom"] = "custom"
    name: ToolName
    description: StrictStr = ""
    input_schema: dict[str, Any]


class Choice(Lenient):
    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool = False

    @model_validator(mode="after")
    def _named(self) -> Choice:
        if self.type == "tool" and self.name is None:
            raise rule("required field is missing", ".name")
        return self

    def chosen(self) -> ToolChoice:
        if self.name is not None and self.type == "tool":
            return ToolChoice("required", (self.name,))
        return ToolChoice("required" if self.type == "any" else "none" if self.type == "none" else "auto")


class OutputFormat(Options):
    without_effect: ClassVar[frozenset[str]] = frozenset(("name", "description", "strict"))

    type: Literal["json_schema"] = "json_schema"
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Options):
    without_effect: ClassVar[frozenset[str]] = frozenset(("effort", "task_budget"))

    format: OutputFormat | None = None


class CountRequest(Body):
    """``POST /v1/messages/count_tokens``."""

    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT

    model: StrictStr
    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1)]
    system: Text = ""
    tools: Annotated[list[MessageTool], tools_of("custom", MessageTool)] = Field(default_factory=list)
    tool_choice: Choice | None = None
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    output_format: OutputFormat | None = None
    mcp_servers: list[Any] = Field(default_factory=list)

    def check(self, version: str | None, beta: bool) -> None:
        """Raises ApiError for another version of the API, what the server does not have, and unknown fields,
        unless a header names a beta, which may define them."""
        if version is not None and version not in VERSIONS:
            known = " or ".join(VERSIONS)
            raise ApiError(400, f"anthropic-version: '{version[:40]}' is not supported; use {known}")
        if version == VERSIONS[1]:
            for name in ("temperature", "top_p", "top_k"):
                if getattr(self, name, None) is not None:
                    raise ApiError(400, f"{name}: Extra inputs are not permitted; {VERSIONS[0]} has it")
        if self.mcp_servers:
            raise ApiError(400, "mcp_servers: is not supported; the server connects to no other server")
        if self.ignored and not beta:
            raise ApiError(400, f"{self.ignored[0][:80]}: Extra inputs are not permitted")

    def chat(self, **more: Any) -> ChatRequest:
        """The same as a chat request. A last message of the assistant is continued."""
        form = self.output_config.format or self.output_format
        if form is not None:
            schema = JsonSchema(schema=form.schema_)
            more["response_format"] = ResponseFormat(type="json_schema", json_schema=schema)
        if self.tool_choice is not None:
            more["tool_choice"] = self.tool_choice.chosen()
            more["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        return ChatRequest(
            model=self.model,
            messages=self._conversation(),
            tools=[_tool(tool) for tool in self.tools],
            continue_final_message=self.messages[-1].role == "assistant",
            **more,
        )

    def _conversation(self) -> list[Message]:
        messages = [Message(role="system", content=self.system)] if self.system else []
        for turn in self.messages:
            texts, calls = "", []
            for block in turn.content:
                if isinstance(block, ToolResultBlock):
                    text = f"Error: {block.content}" if block.is_error else block.content
                    messages.append(Message(role="tool", content=text))
                elif isinstance(block, ToolUseBlock):
                    text = json.dumps(block.input, ensure_ascii=False)
                    call = FunctionCall(name=block.name, arguments=text)
                    calls.append(ToolCall(function=call))
                else:
                    texts += block.text
            results = bool(turn.content) and all(isinstance(each, ToolResultBlock) for each in turn.content)
            if not results:
                messages.append(Message(role=turn.role, content=texts, tool_calls=calls))
        return messages


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: Annotated[Whole, Field(ge=1)]
    stop_sequences: Annotated[list[StrictStr], Field(fail_fast=True, max_length=MOST_STOPS)] = Field(
        default_factory=list
    )
    stream: StrictBool = False
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Number | None = None
    top_k: Whole | None = None

    def request(self) -> ChatRequest:
        return self.chat(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


# The second one differs here in that it has no sampling parameters.
VERSIONS = ("2023-06-01", "2026-10-21")
# The API's names for fields of a chat request.
FIELD_NAMES = {
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    "continue_final_message": "messages",
}


def _tool(tool: MessageTool) -> Tool:
    described: dict[str, Any] = {"description": tool.description} if tool.description else {}
    return Tool(function=Function(name=tool.name, parameters=tool.input_schema, **described))
