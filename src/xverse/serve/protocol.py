"""What clients may send: OpenAI's fields and a few of our own. Unknown ones are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from xverse.engine.request import RANGES

MOST_CHOICES = 16
MOST_STOPS = 16
Number = Annotated[float, Field(strict=True)]


def _ranged(name: str) -> Any:
    """An optional number, its range in the OpenAPI document. The engine itself checks it, and says more."""
    low, high = RANGES[name]
    bounds = {"exclusiveMinimum" if name == "top_p" else "minimum": low, "maximum": high}

    def narrow(schema: dict[str, Any]) -> None:
        number = next(each for each in schema["anyOf"] if each["type"] != "null")
        number.update(bounds)

    return Field(default=None, json_schema_extra=narrow)


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


class Generation(Strict):
    """What both endpoints take."""

    model: StrictStr = ""
    temperature: Number | None = _ranged("temperature")
    top_p: Number | None = _ranged("top_p")
    top_k: StrictInt | None = _ranged("top_k")
    min_p: Number | None = _ranged("min_p")
    repetition_penalty: Number | None = _ranged("repetition_penalty")
    presence_penalty: Number | None = _ranged("presence_penalty")
    frequency_penalty: Number | None = _ranged("frequency_penalty")
    logit_bias: dict[str, Number] | None = None
    seed: StrictInt | None = _ranged("seed")
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS)] | None = None
    max_tokens: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


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
