"""The embedded model against its acceptance list, with the functions of ``recipes/nano/accept.py``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "src" / "xverse" / "assets" / "nano"


def load_accept() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nano_accept", ROOT / "recipes" / "nano" / "accept.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nano_accept"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


accept = load_accept()
TALKS = accept.conversations(accept.load_prompts())


def numbered(group: str) -> list[Any]:
    talks = [talk for talk in TALKS if talk[0] == group]
    return [
        pytest.param(talk, id=f"{language}-{number}")
        for number, talk in enumerate(talks)
        if (language := talk[1])
    ]


@pytest.fixture(scope="module")
def session() -> Any:
    import torch

    if not (NANO / "model.safetensors").exists():
        pytest.skip("this checkout has no embedded model (src/xverse/assets/nano/model.safetensors)")
    threads = torch.get_num_threads()
    yield accept.load_greedy("nano")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def replies(session: Any) -> list[Any]:
    return accept.collect(session, TALKS)


def objections(replies: list[Any], talk: tuple[str, str, list[str]]) -> list[str]:
    group, language, turns = talk
    chosen = [
        reply
        for reply in replies
        if (reply.group, reply.language) == (group, language) and reply.prompt in turns
    ]
    assert len(chosen) == len(turns)
    return [
        f"{reply.prompt!r}: the reply {found}: {reply.text!r}"
        for reply in chosen
        if (found := accept.problem(reply))
    ]


@pytest.mark.parametrize("talk", numbered("general"))
def test_reply_ends_by_itself(replies: list[Any], talk: Any) -> None:
    assert not objections(replies, talk)


@pytest.mark.parametrize("talk", numbered("identity"))
def test_says_who_it_is(replies: list[Any], talk: Any) -> None:
    assert not objections(replies, talk)


@pytest.mark.parametrize("talk", numbered("greetings"))
def test_greets_in_the_language_of_the_greeting(replies: list[Any], talk: Any) -> None:
    assert not objections(replies, talk)


@pytest.mark.parametrize("talk", numbered("conversations"))
def test_three_turns_keep_the_format(replies: list[Any], talk: Any) -> None:
    assert len(talk[2]) == 3
    assert not objections(replies, talk)


def test_size(session: Any) -> None:
    parameters = sum(tensor.numel() for tensor in session.engine.model.parameters())
    assert not accept.size_problems(NANO, parameters)


# ---- the list and the checks themselves: these need no embedded model ----


def test_the_list_is_complete() -> None:
    for group, languages in {"general": {"zh": 10, "en": 10}, "identity": {"zh": 10, "en": 10}}.items():
        for language, count in languages.items():
            turns = [talk[2][0] for talk in TALKS if talk[:2] == (group, language)]
            assert len(set(turns)) == count
    assert len({talk[2][0] for talk in TALKS if talk[0] == "greetings"}) == 10


def test_no_prompt_of_the_list_was_trained_on() -> None:
    lines = (ROOT / "recipes" / "nano" / "persona.jsonl").read_text(encoding="utf-8").splitlines()
    trained = {
        message["content"]
        for line in lines
        for message in json.loads(line)["messages"]
        if message["role"] == "user"
    }
    assert len(trained) > 1000
    assert not trained & {turn for _, _, turns in TALKS for turn in turns}


def reply(text: str, group: str = "general", language: str = "en", reason: str = "stop") -> Any:
    return accept.Reply(group, language, "?", text, reason)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (reply("Paris."), None),
        (reply("Paris", reason="length"), "does not end by itself (length)"),
        (reply(" \n"), "is empty"),
        (reply("a\nb\n a\na\nb"), None),
        (reply("a\nb\n a\na\nb\na "), "has the line 'a' 4 times"),
        (reply("Paris.\n\nHuman: and Rome?"), "contains 'Human:'"),
        (reply("I am XVERSE-nano.", "identity"), None),
        (reply("I am XVERSE.", "identity"), "does not name XVERSE-nano"),
        (reply("Hello! How can I help you?", "greetings"), None),
        (reply("Bonjour, ça va ?", "greetings"), "is not in en: not all of it is ASCII"),
        (reply("Ciao amico!", "greetings"), "is not in en: none of its words is known"),
        (reply("你好！", "greetings"), "is not in en: 0% of its letters are LATIN"),
        (reply("你好！我是 XVERSE-nano。", "greetings", "zh"), None),
        (reply("Hello, 你好", "greetings", "zh"), "is not in zh: 29% of its letters are CJK"),
        (reply("日本語です", "greetings", "zh"), "is not in zh: 60% of its letters are CJK"),
        (reply("!", "greetings", "zh"), "is not in zh: 0% of its letters are CJK"),
        (reply("Привет! Чем могу помочь?", "greetings", "ru"), None),
        (reply("Bonjour ! Comment puis-je vous aider ?", "greetings", "fr"), None),
        (reply("Hello!", "greetings", "fr"), "is not in fr: none of its words is known"),
    ],
)
def test_problem(given: Any, expected: str | None) -> None:
    assert accept.problem(given) == expected


def test_any_model_directory(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from xverse.formats import save_hf

    threads = torch.get_num_threads()
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "random", torch.float32)
    written = ["--markdown", str(tmp_path / "card.md"), "--max-new-tokens", "5"]
    code = accept.main([str(tmp_path / "random"), *written])
    torch.set_num_threads(threads)
    shown, card = capsys.readouterr().out, (tmp_path / "card.md").read_text(encoding="utf-8")
    assert code == 1
    assert "FAIL    0 of  20" in shown
    assert "does not end by itself (length)" in shown
    assert "parameters, not 11,406,592" in shown
    for _, _, turns in TALKS:
        for turn in turns:
            assert f"> {turn}\n" in shown
            assert f"**{turn}**" in card
    assert accept.main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
