"""What a reply must be: the fields that ask for JSON, an expression, a grammar or one of several texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictStr, model_validator

from xverse.serve.errors import ApiError
from xverse.serve.fields import Options, rule


class JsonSchema(Options):
    without_effect: ClassVar[frozenset[str]] = frozenset(("name", "description", "strict"))

    schema_: dict[str, Any] = Field(alias="schema")


def _read_schema(value: Any) -> Any:
    """A JSON schema, or its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise rule("must be a JSON schema") from None


Schema = Annotated[
    dict[str, Any], BeforeValidator(_read_schema, json_schema_input_type=dict[str, Any] | StrictStr)
]
Choices = Annotated[list[StrictStr], Field(fail_fast=True, min_length=1, max_length=1000)]


class ResponseFormat(Options):
    """OpenAI's formats; ``regex`` and ``grammar`` constrain the reply as vLLM's ``structured_outputs``."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")  # of json_object, as in llama.cpp
    regex: StrictStr | None = None
    grammar: StrictStr | None = None

    @model_validator(mode="after")
    def _of_its_type(self) -> ResponseFormat:
        """What is given belongs to the type, so that no schema is ignored; without a type it is the type."""
        for name, kind in _TYPE_OF.items():
            if getattr(self, name) is not None:
                if "type" not in self.model_fields_set:
                    self.type = kind
                if self.type != kind:
                    raise rule(f"needs the type '{kind}', not '{self.type}'", f".{name.rstrip('_')}")
        return self


# The type of a response format that has each of its fields.
_TYPE_OF: dict[str, Literal["json_object", "json_schema", "regex", "grammar"]] = {
    "json_schema": "json_schema",
    "schema_": "json_object",
    "regex": "regex",
    "grammar": "grammar",
}


class StructuredOutputs(Options):
    """vLLM's: at most one of these."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        (
            "whitespace_pattern",
            "disable_any_whitespace",
            "disable_fallback",
            "disable_additional_properties",
            "backend",
        )
    )
    strict_names: ClassVar[bool] = True

    json_: Schema | None = Field(default=None, alias="json")
    regex: StrictStr | None = None
    grammar: StrictStr | None = None
    choice: Choices | None = None
    json_object: StrictBool | None = None


@dataclass(frozen=True)
class Structure:
    """What a reply must be: ``value`` is a JSON schema, a regular expression, a grammar (Lark or GBNF) or a
    list of texts; ``param`` is the field that asks for it."""

    kind: Literal["json_schema", "json_object", "regex", "grammar", "choice"]
    value: Any
    param: str


# The kinds of structures by vLLM's names.
KINDS: dict[str, Literal["json_schema", "json_object", "regex", "grammar", "choice"]] = {
    "json": "json_schema",
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
    "json_object": "json_object",
}


def structure_of(
    form: ResponseFormat, structured: StructuredOutputs, guided: Mapping[str, Any]
) -> Structure | None:
    """What the fields ask for; ``guided`` are vLLM's former ones. Raises ApiError if several do."""
    outputs = structured.model_dump(by_alias=True)
    found = _of_format(form)
    found += _given(outputs, "structured_outputs.") + _given(guided, "guided_")
    if len(found) > 1:
        names = " and ".join(each.param for each in found)
        raise ApiError(400, f"{names} are mutually exclusive", param=found[1].param)
    return found[0] if found else None


def _of_format(form: ResponseFormat) -> list[Structure]:
    param = "response_format"
    if form.type == "text":
        return []
    if form.type == "json_object":
        return [Structure("json_schema" if form.schema_ else "json_object", form.schema_, param)]
    value = getattr(form, form.type)
    if value is None:
        raise ApiError(400, f"{param}.{form.type}: required field is missing", code="missing_field")
    if form.type == "json_schema":
        return [Structure("json_schema", value.schema_, param)]
    return [Structure(form.type, value, param)]


def _given(values: Mapping[str, Any], prefix: str) -> list[Structure]:
    """The structures among ``values``, whose fields have the ``prefix``."""
    given = ((name, kind, values[name]) for name, kind in KINDS.items())
    return [
        Structure(kind, value, prefix + name) for name, kind, value in given if value not in (None, False)
    ]
