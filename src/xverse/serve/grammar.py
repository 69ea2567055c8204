"""Constrained output: JSON schemas and tool calls, enforced token by token with llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NoReturn

import llguidance
import torch
from torch import Tensor

from xverse.serve import tools
from xverse.serve.errors import ApiError
from xverse.serve.protocol import ChatRequest
from xverse.tokenizer import Tokenizer

MOST_BYTES = 64 * 1024  # of a schema
_OBJECT = {"type": "object"}
# Only the spaces after commas and colons: otherwise a model may write whitespace without end.
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Keywords with which one part of a schema refers to the properties of another.
_COMBINED = {"allOf", "oneOf", "not", "if", "dependentSchemas", "unevaluatedProperties"}


class Grammars:
    """Compiles the grammars of requests; one object per server."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids

    @functools.cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        """The bytes of all tokens, computed on first use: with 100,534 entries it takes a while."""
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_TokenizerAdapter(self._tokenizer, self._stop_ids))
        )

    def of_chat(self, body: ChatRequest) -> str | None:
        """The grammar of a reply, or None if it is not constrained. Raises ApiError for a schema that is too
        large or does not compile."""
        response_format = body.response_format
        offered = tools.offered_tools(body)
        if tools.must_call(body):
            schema = tools.call_schema(offered)
            self._check_size(schema, "tools")
            inside = json.dumps({**_closed(schema), "x-guidance": _TIGHT})
            lark = f'start: "{tools.OPEN}" call "{tools.CLOSE}"\ncall: %json {inside}\n'
            return self._compiled(lambda: llguidance.LLMatcher.grammar_from_lark(lark), "tools")
        if response_format is None or response_format.type == "text":
            return None
        if response_format.type == "json_object":
            return self._compiled(lambda: _from_schema(_OBJECT), "response_format")
        if response_format.json_schema is None:
            raise ApiError(400, "response_format: the field json_schema is missing", param="response_format")
        schema = response_format.json_schema.schema_
        self._check_size(schema, "response_format")
        return self._compiled(lambda: _from_schema(schema), "response_format")

    def start(self, grammar: str) -> Grammar:
        return Grammar(
            llguidance.LLMatcher(self._vocabulary, grammar), self._tokenizer.vocab_size, self._stop_ids
        )

    def _check_size(self, schema: Any, param: str) -> None:
        try:
            size = len(json.dumps(schema).encode())
        except RecursionError:
            raise ApiError(400, f"{param}: the schema is nested too deeply", param=param) from None
        if size > MOST_BYTES:
            text = f"{param}: the schema has {size} bytes; the limit is {MOST_BYTES}"
            raise ApiError(400, text, param=param, code="schema_too_large")

    def _compiled(self, make: Callable[[], str], param: str) -> str:
        try:
            grammar = make()
            matcher = llguidance.LLMatcher(self._vocabulary, grammar)
            reason = matcher.get_error() if matcher.is_error() else ""
        except (ValueError, RecursionError) as error:
            reason = str(error)
        if reason:
            text = f"{param}: the schema is not supported: {' '.join(reason.split())[:300]}"
            raise ApiError(400, text, param=param, code="bad_schema")
        return grammar


def _from_schema(schema: dict[str, Any]) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema({**_closed(schema), "x-guidance": _TIGHT})


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with ``additionalProperties: false`` as the default of objects that list properties.

    JSON Schema allows further properties by default, but authors of a list rarely expect them, and a model
    may generate them without end. A schema that combines parts is not changed, because one part may name the
    properties of another.
    """
    return schema if _combines(schema) else _without_others(schema)


def _combines(part: Any) -> bool:
    if isinstance(part, dict):
        return bool(_COMBINED & part.keys()) or any(map(_combines, part.values()))
    return isinstance(part, list) and any(map(_combines, part))


def _without_others(part: Any) -> Any:
    if isinstance(part, list):
        return [_without_others(item) for item in part]
    if not isinstance(part, dict):
        return part
    part = dict(part)
    for key in ("items", "prefixItems", "anyOf", "additionalProperties"):
        if key in part:
            part[key] = _without_others(part[key])
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(part.get(key), dict):
            part[key] = {name: _without_others(item) for name, item in part[key].items()}
    if "properties" in part and not {"$ref", "anyOf"} & part.keys():
        part.setdefault("additionalProperties", False)
    return part


class Grammar:
    """The constraint of one reply; implements ``engine.Constraint``."""

    def __init__(self, matcher: Any, vocab_size: int, stop_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._size = vocab_size
        self._stop_ids = [token for token in stop_ids if token < vocab_size]
        self.failed = ""  # the reason: a schema can compile and still exceed the work limit of a step

    def allowed(self) -> Tensor:
        """The tokens that the grammar allows here, bool [V]."""
        if self._matcher.is_error():
            self._fail()
        if self._matcher.is_stopped():
            allowed = torch.zeros(self._size, dtype=torch.bool)
            allowed[self._stop_ids] = True
            return allowed
        mask = bytearray(self._matcher.compute_bitmask())
        bits = torch.frombuffer(mask, dtype=torch.uint8)  # 8 tokens each, the lowest bit first
        shifts = torch.arange(8, dtype=torch.uint8)
        return (bits[:, None] >> shifts & 1).bool().flatten()[: self._size]

    def accept(self, token_id: int) -> None:
        if token_id in self._stop_ids and (self._matcher.is_stopped() or self._matcher.is_accepting()):
            return
        if not self._matcher.consume_token(token_id):
            self._fail()

    def _fail(self) -> NoReturn:
        self.failed = " ".join(self._matcher.get_error().split())[:300]
        raise ValueError(f"the grammar failed: {self.failed}")


class _TokenizerAdapter:
    """The tokenizer interface that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._tokenizer.encode(text)
