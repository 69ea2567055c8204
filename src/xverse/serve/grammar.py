"""Output that always has the form that was asked for: JSON schemas through llguidance, token by token."""

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
# No blanks but those after commas and colons: a model may otherwise write blanks without an end.
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Keywords by which one part of a schema speaks of another's properties.
_COMBINED = {"allOf", "oneOf", "not", "if", "dependentSchemas", "unevaluatedProperties"}


class Grammars:
    """Compiles what requests ask for. One for each server."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids

    @functools.cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        """The tokens' bytes. Made when the first grammar comes: at 100,534 entries it takes a while."""
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words(self._tokenizer, self._stop_ids)))

    def of_chat(self, asked: ChatRequest) -> str | None:
        """The grammar of a reply, or None where anything may be said. Raises ApiError for one that is too
        large or that does not compile."""
        form = asked.response_format
        offered = tools.offered_tools(asked)
        if tools.must_call(asked):
            schema = tools.call_schema(offered)
            self._check_size(schema, "tools")
            inside = json.dumps({**_closed(schema), "x-guidance": _TIGHT})
            lark = f'start: "{tools.OPEN}" call "{tools.CLOSE}"\ncall: %json {inside}\n'
            return self._compiled(lambda: llguidance.LLMatcher.grammar_from_lark(lark), "tools")
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return self._compiled(lambda: _from_schema(_OBJECT), "response_format")
        if form.json_schema is None:
            raise ApiError(400, "response_format: json_schema is missing", param="response_format")
        schema = form.json_schema.schema_
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
            text = f"{param}: the schema has {size} bytes, at most {MOST_BYTES} are allowed"
            raise ApiError(400, text, param=param, code="schema_too_large")

    def _compiled(self, make: Callable[[], str], param: str) -> str:
        try:
            grammar = make()
            matcher = llguidance.LLMatcher(self._vocabulary, grammar)
            reason = matcher.get_error() if matcher.is_error() else ""
        except (ValueError, RecursionError) as error:
            reason = str(error)
        if reason:
            text = f"{param}: the schema cannot be used: {' '.join(reason.split())[:300]}"
            raise ApiError(400, text, param=param, code="bad_schema")
        return grammar


def _from_schema(schema: dict[str, Any]) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema({**_closed(schema), "x-guidance": _TIGHT})


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without the properties that it does not name.

    JSON Schema allows them wherever nothing else is said, and who lists properties expects no others; a model
    that has begun one may go on without an end. A schema whose parts are combined stays as it is: one part
    may name the properties of another.
    """
    return schema if _combines(schema) else _without_others(schema)


def _combines(part: Any) -> bool:
    if isinstance(part, dict):
        return bool(_COMBINED & part.keys()) or any(map(_combines, part.values()))
    return isinstance(part, list) and any(map(_combines, part))


def _without_others(part: Any) -> Any:
    if isinstance(part, list):
        return [_without_others(each) for each in part]
    if not isinstance(part, dict):
        return part
    part = dict(part)
    for key in ("items", "prefixItems", "anyOf", "additionalProperties"):
        if key in part:
            part[key] = _without_others(part[key])
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(part.get(key), dict):
            part[key] = {name: _without_others(each) for name, each in part[key].items()}
    if "properties" in part and not {"$ref", "anyOf"} & part.keys():
        part.setdefault("additionalProperties", False)
    return part


class Grammar:
    """The constraint of one reply."""

    def __init__(self, matcher: Any, vocab_size: int, stop_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._size = vocab_size
        self._stop_ids = [token for token in stop_ids if token < vocab_size]
        self.failed = ""  # why; a form can be too much work for a step and yet have compiled

    def apply(self, logits: Tensor) -> Tensor:
        """``logits`` float32 [V] with -inf for what the grammar does not allow here."""
        if self._matcher.is_error():
            self._fail()
        if self._matcher.is_stopped():
            allowed = torch.zeros(self._size, dtype=torch.bool)
            allowed[self._stop_ids] = True
        else:
            mask = bytearray(self._matcher.compute_bitmask())
            bits = torch.frombuffer(mask, dtype=torch.uint8)  # 8 tokens each, the lowest bit first
            places = torch.arange(8, dtype=torch.uint8)
            allowed = (bits[:, None] >> places & 1).bool().flatten()[: self._size]
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        if token_id in self._stop_ids and (self._matcher.is_stopped() or self._matcher.is_accepting()):
            return
        if not self._matcher.consume_token(token_id):
            self._fail()

    def _fail(self) -> NoReturn:
        self.failed = " ".join(self._matcher.get_error().split())[:300]
        raise ValueError(f"the grammar failed: {self.failed}")


class _Words:
    """What llguidance asks of a tokenizer."""

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
