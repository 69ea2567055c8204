"""The bodies that clients send: OpenAI's fields, vLLM's where they have an effect here, and a few more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    create_model,
    model_validator,
)

from xverse.engine.sampling_params import MOST_BIASES, MOST_STOPS, PARAMS, Param
from xverse.serve.fields import Body, Lenient, Options, by_type, rule, without_null
from xverse.serve.structures import (
    KINDS,
    Choices,
    ResponseFormat,
    Schema,
    Structure,
    StructuredOutputs,
    structure_of,
)

MOST_CHOICES = 16
MOST_TOOLS = 128
MOST_PROMPTS = 128
SEEDS = 2**62


def _whole(value: Any) -> Any:
    """Some languages write the whole number 5 as 5.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = Annotated[float, Field(strict=True)]
Whole = Annotated[StrictInt, BeforeValidator(_whole, json_schema_input_type=int)]
TokenIds = Annotated[list[StrictInt], Field(fail_fast=True)]


class StreamOptions(Options):
    without_effect: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


# The kinds of content parts that are text, and the field that holds it.
_TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}
_UNREAD_PARTS = ("thinking", "redacted_thinking", "reasoning")  # of other models; this one does not read them


def _text_of(content: Any) -> str:
    """The text of a message's content: a text, or a list of parts, which are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise rule("must be text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise rule("must be an object with the fields type and text", f"[{index}]")
        kind = part.get("type") or "text"
        if kind in _UNREAD_PARTS:
            continue
        if not isinstance(kind, str) or kind not in _TEXT_PARTS:
            raise rule(
                f"parts of type {_quoted(kind)} are not supported; the model reads text only", f"[{index}]"
            )
        text = part.get(_TEXT_PARTS[kind])
        if not isinstance(text, str):
            problem = "required field is missing" if text is None else "must be text"
            raise rule(problem, f"[{index}].{_TEXT_PARTS[kind]}")
        texts.append(text)
    return "".join(texts)


def _quoted(value: Any) -> str:
    return "'" + str(value)[:40] + "'"


def _arguments(value: Any) -> Any:
    """The arguments of a call are a JSON text; some clients send the object itself."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


Arguments = Annotated[StrictStr, BeforeValidator(_arguments, json_schema_input_type=str)]


class FunctionCall(Lenient):
    name: StrictStr
    arguments: Arguments = ""


class ToolCall(Lenient):
    """A call of an earlier turn. OpenAI's custom tools have a text as input, which is written as it is."""

    function: FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _of_custom_tool(cls, values: Any) -> Any:
        custom = values.get("custom") if isinstance(values, dict) else None
        if isinstance(custom, dict) and values.get("function") is None:
            return {**values, "function": {"name": custom.get("name"), "arguments": custom.get("input")}}
        return values


Text = Annotated[str, PlainValidator(_text_of, json_schema_input_type=StrictStr | list[dict[str, Any]])]


class Message(Lenient):
    """``content`` is the text of all parts. A refusal is what the assistant said instead."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text = ""
    refusal: StrictStr = ""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] = Field(default_factory=list)
    function_call: FunctionCall | None = None

    def text(self) -> str:
        return self.content or self.refusal

    def calls(self) -> list[FunctionCall]:
        former = [self.function_call] if self.function_call is not None and not self.tool_calls else []
        return former + [call.function for call in self.tool_calls]


ToolName = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_-]{1,64}$")]


def tools_of(kind: str, model: type[Lenient]) -> PlainValidator:
    """Reads a list of tools, which are all of one type."""

    def read(value: Any) -> list[Any]:
        if isinstance(value, list) and len(value) > MOST_TOOLS:
            raise rule(f"{len(value)} items are too many; the limit is {MOST_TOOLS}")
        return by_type(value, {kind: model}, lambda tool: tool.get("type") or kind, "tools")

    return PlainValidator(read, json_schema_input_type=list[dict[str, Any]])


# Fields of tools elsewhere.
OF_TOOLS = frozenset(
    ("strict", "output_schema", "input_examples", "defer_loading", "allowed_callers", "cache_control")
)


class Function(Options):
    without_effect: ClassVar[frozenset[str]] = OF_TOOLS

    name: ToolName
    description: StrictStr = ""
    parameters: dict[str, Any] = Field(default_factory=dict)


class Tool(Lenient):
    type: Literal["function"] = "function"
    function: Function


Mode = Literal["none", "auto", "required"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class ToolChoice:
    """``mode`` is OpenAI's; ``names`` are the only tools that may be called, None: any."""

    mode: Mode
    names: tuple[str, ...] | None = None


def _tool_choice(value: Any) -> ToolChoice:
    """Reads a mode, one function in either of two notations, or OpenAI's ``allowed_tools``."""
    if isinstance(value, ToolChoice):
        return value
    for mode in MODES:
        if value == mode:
            return ToolChoice(mode)
    if not isinstance(value, dict):
        raise rule("must be 'none', 'auto', 'required' or an object that names a function")
    kind = value.get("type") or "function"
    if kind == "allowed_tools":
        inside = value.get("allowed_tools") or value
        wanted = inside.get("mode") or "auto" if isinstance(inside, dict) else None
        tools = inside.get("tools") if isinstance(inside, dict) else None
        if wanted not in ("auto", "required"):
            raise rule("must be 'auto' or 'required'", ".allowed_tools.mode")
        if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
            raise rule("must be a list of tools", ".allowed_tools.tools")
        return ToolChoice(
            MODES[MODES.index(wanted)],
            tuple(_name(tool, f".allowed_tools.tools[{i}]") for i, tool in enumerate(tools)),
        )
    if kind != "function":
        raise rule(f"{_quoted(kind)} is not supported; use 'function' or 'allowed_tools'", ".type")
    return ToolChoice("required", (_name(value, ""),))


Chosen = Annotated[ToolChoice, PlainValidator(_tool_choice, json_schema_input_type=Mode | dict[str, Any])]


def _name(value: Any, at: str) -> str:
    inside = value.get("function") or value if isinstance(value, dict) else None
    name = inside.get("name") if isinstance(inside, dict) else None
    if not isinstance(name, str):
        raise rule("must be the name of a function", f"{at}.function.name")
    return name


def texts_of(value: Any) -> Any:
    """One text or a list; empty ones, as empty text boxes send them, stop nothing."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise rule("must be text or a list of texts")
    return [text for text in value if text != ""]


def _biases(value: Any) -> Any:
    if isinstance(value, dict):
        value = without_null(value)
        if len(value) > MOST_BIASES:
            raise rule(f"{len(value)} tokens are too many; the limit is {MOST_BIASES}")
        if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in value):
            raise rule("the keys must be token ids")
    return value


def _sampling_field(param: Param) -> tuple[Any, Any]:
    """An optional field; its range is in the OpenAPI document. ``SamplingParams`` checks it."""
    stops = Annotated[list[StrictStr], Field(fail_fast=True, max_length=MOST_STOPS)]
    kinds: dict[type, Any] = {
        float: Number,
        int: Whole,
        str: Annotated[stops, BeforeValidator(texts_of, json_schema_input_type=StrictStr | stops)],
        dict: Annotated[
            dict[str, Number], BeforeValidator(_biases, json_schema_input_type=dict[str, Number])
        ],
    }
    bounds = {"exclusiveMinimum" if param.above else "minimum": param.low, "maximum": param.high}

    def narrow(schema: dict[str, Any]) -> None:
        number = next(option for option in schema["anyOf"] if option["type"] != "null")
        number.update({key: value for key, value in bounds.items() if value is not None})

    ranged = param.kind in (float, int)
    extra: dict[str, Any] = {"json_schema_extra": narrow} if ranged else {}
    return kinds[param.kind] | None, Field(default=None, description=param.help[0], **extra)


if TYPE_CHECKING:
    SamplingFields = Body
else:
    SamplingFields = create_model(
        "SamplingFields", __base__=Body, **{param.http: _sampling_field(param) for param in PARAMS.values()}
    )


class Generation(SamplingFields):
    """The fields of both endpoints: the sampling parameters and what follows here."""

    model: StrictStr = ""
    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    max_completion_tokens: Whole | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MOST_BIASES)] = Field(default_factory=list)
    min_tokens: Annotated[Whole, Field(ge=0)] = 0
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    return_token_ids: StrictBool = False
    response_format: ResponseFormat = Field(default_factory=ResponseFormat)
    structured_outputs: StructuredOutputs = Field(default_factory=StructuredOutputs)
    guided_json: Schema | None = None
    guided_regex: StrictStr | None = None
    guided_grammar: StrictStr | None = None
    guided_choice: Choices | None = None

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the client sets, by the engine's names.

        Other servers write "off" as top_k -1 and "random" as seed -1. Seeds of any size are reduced.
        """
        values = {name: getattr(self, param.http) for name, param in PARAMS.items()}
        if values["top_k"] == -1:
            values["top_k"] = 0
        seed = values["seed"]
        if seed is not None:
            values["seed"] = None if seed == -1 else seed % SEEDS
        if self.max_completion_tokens is not None:
            values["max_new_tokens"] = self.max_completion_tokens
        return {name: value for name, value in values.items() if value is not None}

    @property
    def limit_name(self) -> str:
        """The field that limits the reply: the newer of two names has precedence."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def structure(self) -> Structure | None:
        """What the reply must be, if anything. Raises ApiError if several fields ask for it."""
        guided = {name: getattr(self, f"guided_{name}", None) for name in KINDS}
        return structure_of(self.response_format, self.structured_outputs, guided)


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    logprobs: StrictBool | None = None
    top_logprobs: Whole | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: Chosen | None = None
    parallel_tool_calls: StrictBool | None = None
    functions: Annotated[list[Function], Field(fail_fast=True, max_length=MOST_TOOLS)] = Field(
        default_factory=list, description="former name of tools"
    )
    function_call: Chosen | None = Field(default=None, description="former name of tool_choice")
    modalities: list[Literal["text"]] | None = None
    continue_final_message: StrictBool = False

    @property
    def former_names(self) -> bool:
        """Whether the client uses ``functions``, and expects ``function_call`` in the reply."""
        return bool(self.functions) and not self.tools

    def all_tools(self) -> list[Tool]:
        return self.tools or [Tool(function=function) for function in self.functions]

    def choice(self) -> ToolChoice:
        return self.tool_choice or self.function_call or ToolChoice("auto")

    @property
    def must_call(self) -> bool:
        return self.choice().mode == "required"


def texts_or_ids(value: Any, most: int, kind: str) -> list[str | list[int]]:
    """A text, token ids, or a list of up to ``most`` of either, as a list. ``kind`` names them in errors."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list):
        raise rule("must be text, a list of token ids, or a list of these")
    if not value:
        raise rule("the list is empty")
    if len(value) > most:
        raise rule(f"{len(value)} {kind} are too many; the limit is {most}")
    for index, one in enumerate(value):
        if not isinstance(one, str) and not (isinstance(one, list) and set(map(type, one)) <= {int}):
            raise rule("must be text or a list of token ids", f"[{index}]" if len(value) > 1 else "")
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    return texts_or_ids(value, MOST_PROMPTS, "prompts")


def _no_suffix(value: str) -> str:
    if value:
        raise rule("is not supported; the model cannot insert text")
    return value


class CompletionRequest(Generation):
    """``POST /v1/completions``: one prompt, as text or token ids, or several."""

    prompt: Annotated[
        Any,
        PlainValidator(
            _prompts,
            json_schema_input_type=StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]],
        ),
    ]
    echo: StrictBool | None = None
    logprobs: Whole | None = None
    suffix: Annotated[StrictStr, AfterValidator(_no_suffix)] | None = None
    best_of: Whole | None = None
