"""Tolerance towards clients: fields without effect, and what happens to unknown ones.

``null`` counts as absent everywhere. Inside messages, tools and other parts unknown fields are ignored,
because clients send replies of many servers back. At the top of a body they are ignored and reported, unless
a name resembles an implemented one: such a field is refused as a misspelling.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from xverse.serve.access_log import current
from xverse.serve.errors import ApiError, of_validation

# Fields that cannot change a reply of this server, by the reason; docs/api.md lists them.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "labels of the caller": ("user", "safety_identifier", "metadata", "request_id", "vllm_xargs"),
    "storage and billing at OpenAI": ("store", "service_tier", "moderation"),
    "caching and scheduling, which the server decides itself": (
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "cache_salt", "cache_prompt"),
        *("priority", "prediction", "kv_transfer_params", "keep_alive"),
    ),
    "reasoning, which the model does not do": (
        *("reasoning_effort", "reasoning", "include_reasoning", "thinking", "enable_thinking", "verbosity"),
    ),
    "XVERSE's chat format has no such options": (
        *("chat_template_kwargs", "add_special_tokens", "spaces_between_special_tokens"),
    ),
    "tools and media that the server does not have": ("web_search_options", "audio", "mm_processor_kwargs"),
    "choices of another implementation": (
        *("guided_decoding_backend", "guided_whitespace_pattern", "length_penalty", "early_stopping"),
    ),
}
NO_EFFECT = frozenset(name for names in WITHOUT_EFFECT.values() for name in names)
# Fields of other servers that this one lacks. They are reported as ignored and never taken for misspellings.
ELSEWHERE = frozenset(
    (
        *("allowed_token_ids", "bad_words", "include_stop_str_in_output", "logits_processors"),
        *("prompt_logprobs", "prompt_embeds", "repetition_detection", "return_tokens_as_token_ids"),
        *("truncate_prompt_tokens", "use_beam_search", "chat_template", "documents", "add_generation_prompt"),
        *("repeat_penalty", "repeat_last_n", "typical_p", "top_n_sigma", "top_a", "n_predict", "num_predict"),
        *("n_probs", "min_keep", "samplers", "tfs_z", "json_schema", "grammar", "options", "format"),
    )
)
MOST_UNKNOWN = 50
MOST_ITEMS = 30_000  # in one body: their number, not their bytes, determines how long validation takes
_LIKE = 0.8  # similarity from which an unknown name counts as a misspelling


def rule(text: str, at: str = "") -> PydanticCustomError:
    """A validation error in the API's words; ``at`` continues the path of the field."""
    return PydanticCustomError("rule", "{text}", {"text": text, "at": at})


class Lenient(BaseModel):
    """A part of a body: ``null`` fields are absent, unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        return without_null(values) if isinstance(values, dict) else values

    @classmethod
    def names(cls) -> set[str]:
        """Of the fields, as clients write them."""
        return {field.alias or name for name, field in cls.model_fields.items()}


class Options(Lenient):
    """What a client wants. ``ignored`` holds the names of unknown fields, which the response's header and the
    access log report; names that resemble a known one are refused, as are all if ``strict_names``."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    strict_names: ClassVar[bool] = False
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        return self._ignored

    @classmethod
    def unknown(cls, values: dict[str, Any]) -> list[str]:
        known = cls.names() | cls.without_effect
        return [name for name, value in values.items() if value is not None and name not in known]

    @model_validator(mode="wrap")
    @classmethod
    def _known(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            return handler(values)
        unknown = cls.unknown(values)
        if len(unknown) > MOST_UNKNOWN:
            raise rule(f"{len(unknown)} unknown fields are too many; the limit is {MOST_UNKNOWN}")
        for name in unknown:
            meant = None if name in ELSEWHERE else misspelt(name, cls.names())
            if meant or cls.strict_names:
                raise rule("unknown field" + (f"; did you mean '{meant}'?" if meant else ""), f".{name[:64]}")
        part = handler(values)
        part._ignored = tuple(unknown)
        for name, field in cls.model_fields.items():
            if isinstance(inner := getattr(part, name), Options):
                part._ignored += tuple(f"{field.alias or name}.{each}" for each in inner._ignored)
        return part


def by_type(
    value: Any,
    kinds: Mapping[str, type[Lenient] | None],
    kind_of: Callable[[dict[str, Any]], str],
    what: str,
    otherwise: str = "",
) -> list[Any]:
    """A list of objects, each read as the model in ``kinds`` for its type; those of type None are left out.
    Raises the error of the first wrong one, with its index. ``what`` names the objects, ``otherwise`` what
    may be in place of the list."""
    if not isinstance(value, list):
        raise rule(f"must be {otherwise}a list of {what}")
    found: list[Any] = []
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise rule("must be an object", f"[{index}]")
        kind = kind_of(item)
        if kind is None:
            raise rule("required field is missing", f"[{index}].type")
        if not isinstance(kind, str) or kind not in kinds:
            raise rule(f"{what} of type '{str(kind)[:40]}' are not supported", f"[{index}].type")
        model = kinds[kind]
        if model is None:
            continue
        try:
            found.append(model.model_validate(item))
        except ValidationError as error:
            wrong = of_validation(error.errors()[0])
            path = wrong.param or ""
            text = str(wrong).removeprefix(f"{path or 'the body'}: ")
            raise rule(text, f"[{index}]" + (f".{path}" if path and path[0] != "[" else path)) from None
    return found


class Body(Options):
    """A whole body."""

    without_effect: ClassVar[frozenset[str]] = NO_EFFECT
    token_ids: ClassVar[tuple[str, ...]] = ("prompt", "tokens")  # fields that may be long lists of them

    @model_validator(mode="wrap")
    @classmethod
    def _bounded(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(values, dict):
            _check_items(values, cls.token_ids)
        body = handler(values)
        if body.ignored:
            current().ignored = body.ignored
        return body


def refuse_unsupported(body: Body, reasons: Mapping[str, str]) -> None:
    """Raises ApiError for the first field in ``reasons`` that the client sets."""
    for name, reason in reasons.items():
        if getattr(body, name):
            raise ApiError(400, f"{name}: is not supported; {reason}")


def without_null(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


MOST_METADATA = 16


def _metadata(value: Any) -> dict[str, str]:
    value = without_null(value) if isinstance(value, dict) else value
    if not isinstance(value, dict):
        raise rule("must be an object of texts")
    if len(value) > MOST_METADATA:
        raise rule(f"{len(value)} items are too many; the limit is {MOST_METADATA}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise rule("must be text", f".{key[:64]}")
        if len(key) > 64 or len(text) > 512:
            raise rule("names have up to 64 characters and texts up to 512", f".{key[:64]}")
    return value


Metadata = Annotated[dict[str, str], PlainValidator(_metadata, json_schema_input_type=dict[str, str])]


def misspelt(name: str, known: Any) -> str | None:
    """The known name that ``name`` is probably meant to be: it differs in a few letters, case or dashes."""
    if len(name) > 64:
        return None
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
    close = difflib.get_close_matches(plain, sorted(known), n=1, cutoff=_LIKE)
    return close[0] if close else None


def _check_items(values: dict[str, Any], token_ids: tuple[str, ...]) -> None:
    """Raises ApiError for a body of too many parts. Token ids do not count; they are quick to check."""
    count = len(values)
    stack: list[Any] = (
        [value for name, value in values.items() if name not in token_ids] if count <= MOST_ITEMS else []
    )
    while count <= MOST_ITEMS and stack:
        part = stack.pop()
        if isinstance(part, (dict, list)):
            count += len(part)
            if count <= MOST_ITEMS:
                stack += part.values() if isinstance(part, dict) else part
    if count > MOST_ITEMS:
        text = f"the body has more than {MOST_ITEMS} fields and list items; send fewer messages or parts"
        raise ApiError(400, text, code="body_too_complex")
