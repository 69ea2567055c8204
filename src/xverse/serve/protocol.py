"""The bodies that clients send: OpenAI's fields and a few more. Unknown fields are refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, create_model

from xverse.engine.sampling_params import MOST_STOPS, PARAMS, Param

MOST_CHOICES = 16
Number = Annotated[float, Field(strict=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: StrictBool = False


class TextPart(Strict):
    type: Literal["text"]
    text: StrictStr


class FunctionCall(Strict):
    name: StrictStr
    arguments: StrictStr


class ToolCall(Strict):
    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    refusal: None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: StrictStr = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: StrictBool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ToolName(Strict):
    name: StrictStr


class ToolChoice(Strict):
    type: Literal["function"]
    function: ToolName


class JsonSchema(Strict):
    name: StrictStr = "schema"
    description: StrictStr = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def _sampling_field(param: Param) -> tuple[Any, Any]:
    """An optional field; its range is in the OpenAPI document. ``SamplingParams`` checks it."""
    kinds: dict[type, Any] = {
        float: Number,
        int: StrictInt,
        str: StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS)],
        dict: dict[str, Number],
    }
    bounds = {"exclusiveMinimum" if param.above else "minimum": param.low, "maximum": param.high}

    def narrow(schema: dict[str, Any]) -> None:
        number = next(option for option in schema["anyOf"] if option["type"] != "null")
        number.update({key: value for key, value in bounds.items() if value is not None})

    ranged = param.kind in (float, int)
    extra: dict[str, Any] = {"json_schema_extra": narrow} if ranged else {}
    return kinds[param.kind] | None, Field(default=None, description=param.help[0], **extra)


if TYPE_CHECKING:
    SamplingFields = Strict
else:
    SamplingFields = create_model(
        "SamplingFields", __base__=Strict, **{param.http: _sampling_field(param) for param in PARAMS.values()}
    )


class Generation(SamplingFields):
    """The fields of both endpoints: the sampling parameters and what follows here."""

    model: StrictStr = ""
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the client sets, by the engine's names."""
        values = {name: getattr(self, param.http) for name, param in PARAMS.items()}
        if isinstance(values["stop"], str):
            values["stop"] = (values["stop"],)
        return {name: value for name, value in values.items() if value is not None}


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None


class CompletionRequest(Generation):
    """``POST /v1/completions``: one prompt, as text or token ids, or several."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    echo: StrictBool | None = None
    logprobs: StrictInt | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class TokenizeRequest(Strict):
    """``POST /tokenize``."""

    text: StrictStr
    allow_special: StrictBool = False


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    tokens: list[StrictInt]
