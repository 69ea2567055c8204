"""The bodies of Ollama's API."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PlainValidator, StrictBool, StrictInt, StrictStr

from xverse.serve.access_log import current
from xverse.serve.errors import ApiError
from xverse.serve.fields import NO_EFFECT, Body, Options, refuse_unsupported, rule
from xverse.serve.protocol import (
    MOST_TOOLS,
    ChatRequest,
    CompletionRequest,
    Message,
    Number,
    Tool,
    Whole,
    texts_of,
)
from xverse.serve.structures import JsonSchema, ResponseFormat

# Options of Ollama's runner that cannot change a reply here; docs/api.md lists them.
OPTIONS_WITHOUT_EFFECT = frozenset(
    (
        *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram", "f16_kv"),
        *("use_mmap", "use_mlock", "vocab_only", "logits_all", "embedding_only"),
    )
)
_ENDLESS = (-1, -2)  # num_predict: as many tokens as the context has room for
_MOST = 2**31


class RunnerOptions(Options):
    """Sampling parameters by Ollama's names."""

    without_effect: ClassVar[frozenset[str]] = OPTIONS_WITHOUT_EFFECT

    num_predict: Whole | None = None
    temperature: Number | None = None
    top_k: Whole | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repeat_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    seed: Whole | None = None
    stop: Annotated[list[StrictStr], BeforeValidator(texts_of)] | None = None

    def fields(self) -> dict[str, Any]:
        """The same as fields of OpenAI's requests."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        limit = values.pop("num_predict")
        values["max_tokens"] = _MOST if limit in _ENDLESS else limit
        values["repetition_penalty"] = values.pop("repeat_penalty")
        return values


def _format(value: Any) -> ResponseFormat:
    if value == "":
        return ResponseFormat()
    if value == "json":
        return ResponseFormat(type="json_object")
    if isinstance(value, dict):
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=value))
    raise rule('must be "json" or a JSON schema')


Format = Annotated[ResponseFormat, PlainValidator(_format, json_schema_input_type=StrictStr | dict[str, Any])]


def _no_images(value: Any) -> Any:
    if value:
        raise rule("is not supported; the model reads text only")
    return value


Images = Annotated[list[Any], BeforeValidator(_no_images)]


class OllamaMessage(Message):
    images: Images = Field(default_factory=list)


class _Request(Body):
    """What all of Ollama's requests may have."""

    without_effect: ClassVar[frozenset[str]] = NO_EFFECT - {"thinking", "reasoning"}

    model: StrictStr
    options: RunnerOptions = Field(default_factory=RunnerOptions)
    keep_alive: Any = None


class _Generation(_Request):
    stream: StrictBool = True
    format: Format = Field(default_factory=ResponseFormat)
    think: Any = None

    def check(self) -> None:
        """Raises ApiError for what the model does not do."""
        if self.think:
            raise ApiError(400, f'"{self.model}" does not support thinking', param="think")


class OllamaChatRequest(_Generation):
    """``POST /api/chat``."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True)] = Field(default_factory=list)
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] = Field(default_factory=list)

    def chat(self) -> ChatRequest:
        return ChatRequest(
            messages=[*self.messages], tools=self.tools, response_format=self.format, **self.options.fields()
        )


class OllamaGenerateRequest(_Generation):
    """``POST /api/generate``."""

    prompt: StrictStr = ""
    system: StrictStr = ""
    raw: StrictBool = False
    images: Images = Field(default_factory=list)
    suffix: StrictStr = ""
    template: StrictStr = ""
    context: list[StrictInt] = Field(default_factory=list)

    def check(self) -> None:
        super().check()
        reasons = {
            "suffix": "the model cannot insert text",
            "template": "the model has one format of conversations; raw: true uses none",
            "context": "send the conversation to /api/chat",
        }
        refuse_unsupported(self, reasons)

    def chat(self) -> ChatRequest:
        system = [Message(role="system", content=self.system)] if self.system else []
        return ChatRequest(
            messages=[*system, Message(role="user", content=self.prompt)],
            response_format=self.format,
            **self.options.fields(),
        )

    def completion(self, most: int) -> CompletionRequest:
        """The prompt as it is, and at most that many tokens."""
        fields = self.options.fields()
        limit = fields["max_tokens"]
        fields["max_tokens"] = min(limit, most) if limit is not None and limit > 0 else limit
        return CompletionRequest(prompt=self.prompt, response_format=self.format, **fields)


def _inputs(value: Any) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise rule("must be text or a list of texts")
    return value


class OllamaEmbedRequest(_Request):
    """``POST /api/embed``."""

    input: Annotated[list[str], PlainValidator(_inputs, json_schema_input_type=StrictStr | list[StrictStr])]
    truncate: StrictBool = True
    dimensions: Whole | None = None


class OllamaEmbeddingsRequest(_Request):
    """``POST /api/embeddings``, the former route."""

    prompt: StrictStr = ""


class OllamaShowRequest(Body):
    """``POST /api/show``; ``name`` is the former name of ``model``."""

    model: StrictStr = ""
    name: StrictStr = ""
    verbose: StrictBool = False


# Ollama's names for fields of OpenAI's requests.
FIELD_NAMES = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
    **{
        name: f"options.{name}"
        for name in ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
    },
    "seed": "options.seed",
    "stop": "options.stop",
}


def use_field_names(**more: str) -> dict[str, str]:
    """Let errors name Ollama's fields; returns the names."""
    current().field_names = {**FIELD_NAMES, **more}
    return dict(current().field_names)
