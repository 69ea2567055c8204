"""Every sampling parameter on every surface: flags, /params, generation_config.json, HTTP, page.

``model.chat`` is tested in tests/hf/test_chat.py.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xverse.cli import verb_parser
from xverse.commands.sampling import given_sampling
from xverse.config import UserError
from xverse.engine.sampling_params import (
    CHAT,
    COMPLETION,
    PARAMS,
    SamplingParams,
    from_generation_config,
    unsupported_keys,
)

VALUES: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.6,
    "min_p": 0.1,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "seed": 11,
    "max_new_tokens": 77,
    "stop": ("END",),
    "logit_bias": {5: 1.5},
}
OUTSIDE: dict[str, Any] = {
    "temperature": 101,
    "top_k": -1,
    "top_p": 0,
    "min_p": 1.5,
    "repetition_penalty": 0,
    "presence_penalty": 3,
    "frequency_penalty": -3,
    "seed": -1,
    "max_new_tokens": 0,
    "stop": ("",),
    "logit_bias": {5: 101},
}
EVERY = list(PARAMS)
SETTABLE = [name for name in PARAMS if not PARAMS[name].api_only]


def test_the_samples_cover_every_parameter() -> None:
    assert VALUES.keys() == OUTSIDE.keys() == PARAMS.keys()
    assert [name for name in PARAMS if PARAMS[name].api_only] == ["logit_bias"]


@pytest.mark.parametrize("name", EVERY)
def test_range(name: str) -> None:
    assert getattr(SamplingParams(**{name: VALUES[name]}), name) == VALUES[name]
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: OUTSIDE[name]})
    assert all(PARAMS[name].label)
    assert all(PARAMS[name].help)


@pytest.mark.parametrize("verb", ["chat", "serve"])
@pytest.mark.parametrize("name", SETTABLE)
def test_command_line(name: str, verb: str) -> None:
    value, outside = VALUES[name], OUTSIDE[name]
    texts = [text[0] if isinstance(text, tuple) else str(text) for text in (value, outside)]
    parser = verb_parser(verb)
    given = given_sampling(parser.parse_args([PARAMS[name].flag, texts[0]]))
    assert getattr(SamplingParams(**given), name) == value
    with pytest.raises((UserError, SystemExit), match=f"{name}|2"):  # the parser refuses an empty text itself
        given_sampling(parser.parse_args([f"{PARAMS[name].flag}={texts[1]}"]))
    assert given_sampling(parser.parse_args([])) == {}


@pytest.mark.parametrize("name", SETTABLE)
def test_params_in_the_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xverse.chat.terminal import Terminal

    notices: list[str] = []
    monkeypatch.setattr("xverse.chat.terminal.notice", notices.append)
    session: Any = SimpleNamespace(sampling=CHAT)
    terminal = Terminal(session, io.StringIO(), io.StringIO())
    text = VALUES[name][0] if name == "stop" else VALUES[name]
    terminal._command(f"/params {name}={text}")
    assert getattr(session.sampling, name) == VALUES[name]
    assert f"{name} = " in notices[-1]


@pytest.mark.parametrize("name", SETTABLE)
def test_generation_config(name: str) -> None:
    values = {PARAMS[name].stored: list(VALUES[name]) if name == "stop" else VALUES[name]}
    assert getattr(from_generation_config(values, CHAT), name) == VALUES[name]
    assert unsupported_keys(values) == []


def test_unsupported_keys_of_a_generation_config() -> None:
    neutral = {"transformers_version": "5.0", "_from_model_config": True, "use_cache": True, "num_beams": 1}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": [3], "max_new_tokens": 5, "max_length": 20}
    assert unsupported_keys({**neutral, **ids, "top_h": None, "do_sample": True}) == []
    assert unsupported_keys({"num_beams": 4, "max_length": 20, "typical_p": 0.9}) == [
        "num_beams",
        "max_length",
        "typical_p",
    ]


def test_unsupported_keys_are_reported_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from xverse.engine import load

    notices: list[str] = []
    monkeypatch.setattr(load, "notice", notices.append)
    for _ in range(2):
        load._report_unsupported(tmp_path, {"num_beams": 4, "temperature": 0.5, "typical_p": 0.9})
    assert notices == [f"{tmp_path / 'generation_config.json'}: num_beams, typical_p not supported; ignored"]


@pytest.mark.parametrize("name", EVERY)
def test_http(name: str) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("llguidance")
    from xverse.serve.protocol import ChatRequest, CompletionRequest
    from xverse.serve.service import Service

    value = {"5": 1.5} if name == "logit_bias" else list(VALUES[name]) if name == "stop" else VALUES[name]
    fields = {PARAMS[name].http: value}
    bodies = (
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields}),
        CompletionRequest.model_validate({"prompt": "x", **fields}),
    )
    unused: Any = None
    service = Service(
        runner=unused, tokenizer=unused, name="", sampling=CHAT, stop_ids=(), grammars=unused, metrics=unused
    )
    for body in bodies:
        tokens = body.sampling().get("max_new_tokens", CHAT.max_new_tokens)
        assert getattr(service._sampling(body, 0, tokens), name) == VALUES[name]
        schema = type(body).model_json_schema()["properties"][PARAMS[name].http]
        if PARAMS[name].kind in (int, float):
            number = schema["anyOf"][0]
            assert number.get("minimum", number.get("exclusiveMinimum")) == PARAMS[name].low
            assert number.get("maximum") == PARAMS[name].high


@pytest.mark.parametrize("name", SETTABLE)
def test_page(name: str) -> None:
    """The page draws its controls from this list; tests/serve/test_page.py moves them."""
    pytest.importorskip("fastapi")
    pytest.importorskip("llguidance")
    from xverse.serve.page import controls

    found = {control["name"]: control for control in controls(SimpleNamespace(sampling=CHAT, context=8192))}
    assert list(found) == [PARAMS[each].http for each in SETTABLE]
    control, param = found[PARAMS[name].http], PARAMS[name]
    assert control["chat"] == getattr(CHAT, name)
    assert control["generation"] == getattr(COMPLETION, name)
    assert (control["low"], control["high"], control["above"]) == (param.low, param.high, param.above)
    assert control["texts"]["zh"] == param.text("zh")
    json.dumps(control, allow_nan=False)


def test_every_stored_key_with_every_kind_of_value() -> None:
    """A generation_config.json is read, or refused in one line."""
    wrong = [-1, 2.5, "x", "", [], {}, [1], ["a", 3], True, float("nan"), float("inf"), 10**400, "\ud800"]
    keys = [param.stored for param in PARAMS.values()] + ["do_sample", "num_beams", "max_length"]
    messages = []
    for key in keys:
        for value in wrong:
            try:
                from_generation_config({key: value}, CHAT)
            except UserError as error:
                messages.append(str(error))
            unsupported_keys({key: value})
    assert len(messages) > len(keys)
    assert all("\n" not in message for message in messages)
