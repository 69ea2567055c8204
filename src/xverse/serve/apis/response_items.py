"""The bodies of ``/v1/responses``: items of input, tools, and the request itself."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, StrictBool, StrictStr

from xverse.engine.sampling_params import PARAMS
from xverse.serve.errors import ApiError
from xverse.serve.fields import NO_EFFECT, Lenient, Metadata, Options, by_type, refuse_unsupported, rule
from xverse.serve.protocol import (
    OF_TOOLS,
    Arguments,
    ChatRequest,
    Chosen,
    Function,
    FunctionCall,
    Message,
    SamplingFields,
    Text,
    Tool,
    ToolCall,
    ToolName,
    Whole,
    tools_of,
)
from xverse.serve.replies import new_id
from xverse.serve.structures import JsonSchema, ResponseFormat

# Fields that cannot change a reply here; docs/api.md lists them.
WITHOUT_EFFECT = NO_EFFECT | {
    *("max_tool_calls", "stream_options", "context_management", "image", "access_programs"),
    *("background_options", "client_metadata"),
}
# Of ``include``; the others concern tools and reasoning, of which replies have none.
INCLUDED = (
    *("message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results"),
    *("web_search_call.results", "web_search_call.action.sources", "message.input_image.image_url"),
    *("code_interpreter_call.outputs", "computer_call_output.output.image_url"),
)


class MessageItem(Lenient):
    type: Literal["message"] = "message"
    id: StrictStr = Field(default_factory=lambda: new_id("msg"))
    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    def stored(self) -> dict[str, Any]:
        kind = "output_text" if self.role == "assistant" else "input_text"
        part: dict[str, Any] = {"type": kind, "text": self.content}
        if self.role == "assistant":
            part |= {"annotations": [], "logprobs": []}
        return {**self.model_dump(exclude={"content"}), "status": "completed", "content": [part]}


class CallItem(Lenient):
    type: Literal["function_call"] = "function_call"
    id: StrictStr = Field(default_factory=lambda: new_id("fc"))
    call_id: StrictStr
    name: StrictStr
    arguments: Arguments = "{}"

    def stored(self) -> dict[str, Any]:
        return {**self.model_dump(), "status": "completed"}


class OutputItem(Lenient):
    type: Literal["function_call_output"] = "function_call_output"
    id: StrictStr = Field(default_factory=lambda: new_id("fco"))
    call_id: StrictStr
    output: Text = ""

    def stored(self) -> dict[str, Any]:
        return {**self.model_dump(), "status": "completed"}


class ReferenceItem(Lenient):
    """An item of an earlier response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: StrictStr


Item = MessageItem | CallItem | OutputItem | ReferenceItem
_ITEMS: dict[str, type[Lenient] | None] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "item_reference": ReferenceItem,
    "reasoning": None,  # of another model; this one does not read it
}


def _item_type(item: dict[str, Any]) -> Any:
    """Messages may come without a type, and so may references, which have nothing else than an id."""
    return item.get("type") or ("item_reference" if item.keys() <= {"id", "type"} else "message")


def _items(value: Any) -> list[Item]:
    if isinstance(value, str):
        return [MessageItem(role="user", content=value)]
    items = by_type(value, _ITEMS, _item_type, "items", "text or ")
    if not items:
        raise rule("at least 1 item is needed")
    return items


def read_stored(item: dict[str, Any]) -> Item:
    """An item that ``stored`` wrote, or one of a response's output."""
    return _items([item])[0]


class FunctionTool(Options):
    """A tool; the Responses API has the function's fields beside the type."""

    without_effect: ClassVar[frozenset[str]] = OF_TOOLS

    type: Literal["function"] = "function"
    name: ToolName
    description: StrictStr = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: Any = None


class TextFormat(Options):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Any = "schema"
    description: Any = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: Any = None


class TextOptions(Options):
    format: TextFormat = Field(default_factory=TextFormat)
    verbosity: Any = None


class ResponsesRequest(SamplingFields):
    """``POST /v1/responses``."""

    without_effect: ClassVar[frozenset[str]] = frozenset(WITHOUT_EFFECT)

    model: StrictStr = ""
    input: Annotated[
        list[Item], PlainValidator(_items, json_schema_input_type=StrictStr | list[dict[str, Any]])
    ]
    instructions: StrictStr | None = None
    max_output_tokens: Whole | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool = True
    stream: StrictBool = False
    include: list[StrictStr] = Field(default_factory=list)
    text: TextOptions = Field(default_factory=TextOptions)
    tools: Annotated[list[FunctionTool], tools_of("function", FunctionTool)] = Field(default_factory=list)
    tool_choice: Chosen | None = None
    parallel_tool_calls: StrictBool = True
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] = 0
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: Metadata = Field(default_factory=dict)
    user: Any = None
    background: StrictBool = False
    conversation: Any = None
    prompt: Any = None

    @property
    def logprobs(self) -> bool:
        return "message.output_text.logprobs" in self.include

    def check(self) -> None:
        """Raises ApiError for what the server does not have."""
        reasons = {
            "background": "replies are not computed in the background",
            "conversation": "conversations are not kept; use previous_response_id",
            "prompt": "the server has no stored prompts; use instructions and input",
        }
        refuse_unsupported(self, reasons)
        for index, name in enumerate(self.include):
            if name not in INCLUDED:
                raise ApiError(400, f"include[{index}]: must be one of {', '.join(INCLUDED)}")

    def chat(self, messages: list[Message]) -> ChatRequest:
        """The same as a chat request about ``messages``."""
        form = self.text.format
        schema = None
        if form.type != "json_schema" and form.schema_ is not None:
            raise ApiError(400, f"text.format.schema: needs the type 'json_schema', not '{form.type}'")
        if form.type == "json_schema":
            if form.schema_ is None:
                where = "text.format.schema"
                raise ApiError(400, f"{where}: required field is missing", code="missing_field")
            schema = JsonSchema(schema=form.schema_)
        sampling = {param.http: getattr(self, param.http) for param in PARAMS.values()}
        if self.max_output_tokens is not None:
            sampling["max_tokens"] = self.max_output_tokens
        return ChatRequest(
            model=self.model,
            messages=messages,
            response_format=ResponseFormat(type=form.type, json_schema=schema),
            tools=[
                Tool(function=Function(**tool.model_dump(exclude_unset=True, exclude={"type", "strict"})))
                for tool in self.tools
            ],
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            **sampling,
        )


# The API's names for fields of a chat request.
FIELD_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}


def messages_of(instructions: str | None, items: list[Item]) -> list[Message]:
    """The conversation of ``items``, in which calls belong to the assistant's message before them."""
    messages = [Message(role="system", content=instructions)] if instructions else []
    for item in items:
        if isinstance(item, MessageItem):
            messages.append(Message(role=item.role, content=item.content))
        elif isinstance(item, CallItem):
            call = ToolCall(function=FunctionCall(name=item.name, arguments=item.arguments))
            if not (messages and messages[-1].role == "assistant"):
                messages.append(Message(role="assistant"))
            messages[-1].tool_calls.append(call)
        elif isinstance(item, OutputItem):
            messages.append(Message(role="tool", content=item.output))
    return messages
