from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch

from xverse.chat.session import Session, load_session
from xverse.chat.terminal import Terminal
from xverse.config import UserError
from xverse.engine.sampling_params import CHAT, SamplingParams, from_generation_config

from .reciter import POSITIONS, RECITED


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr("xverse.chat.terminal.notice", texts.append)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    return texts


@pytest.fixture
def session(reciting_model: Path, notices: list[str]) -> Session:
    return load_session(str(reciting_model), {}, threads=1, notify=notices.append)


def converse(session: Session, *lines: str) -> tuple[str, int]:
    """Run lines as from a pipe; returns stdout and the exit code."""
    stdout = io.StringIO()
    code = Terminal(session, io.StringIO("".join(line + "\n" for line in lines)), stdout).run()
    return stdout.getvalue(), code


def test_turns_are_kept(session: Session) -> None:
    out, code = converse(session, "hello", "", "再见", "//slash")
    assert (out, code) == (3 * (RECITED + "\n"), 0)
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3
    assert [message["content"] for message in session.messages[1::2]] == [RECITED] * 3
    assert [message["content"] for message in session.messages[::2]] == ["hello", "再见", "/slash"]


def test_reset_system_save_load(session: Session, tmp_path: Path, notices: list[str]) -> None:
    path = tmp_path / "my talk.json"
    out, code = converse(session, "/system 简短地回答", "hello", f"/save {path}", "/reset", "again")
    assert (out, code) == (2 * (RECITED + "\n"), 0)
    saved = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert [message["content"] for message in session.messages] == ["简短地回答", "again", RECITED]
    converse(session, "/system", f"/load {path}")
    assert session.messages == saved
    assert session.system == "简短地回答"
    converse(session, "/system other", "/reset", "/system")
    assert session.messages == []
    assert "system prompt removed" in notices


def test_undo_and_retry(session: Session, notices: list[str]) -> None:
    assert converse(session, "/system s", "one", "two", "/undo", "/retry") == (3 * (RECITED + "\n"), 0)
    assert [message["content"] for message in session.messages] == ["s", "one", RECITED]
    assert "taken back: two" in notices
    session.retry().close()  # before it begins
    reply = session.retry()
    said = next(reply)
    reply.close()
    assert [message["content"] for message in session.messages] == ["s", "one", said]
    assert converse(session, "/params seed=1", "/retry", "/undo") == (RECITED + "\n", 0)
    assert any("stays the same" in text for text in notices)
    assert session.messages == [{"role": "system", "content": "s"}]
    for command in ("/undo", "/retry"):
        assert converse(session, command) == ("", 2)
        assert "no message to take back" in notices[-1]


def test_an_interrupted_retry_keeps_the_old_reply(session: Session) -> None:
    converse(session, "one")
    with torch.no_grad():
        session.engine.model.lm_head.weight[5] = torch.nan
    assert converse(session, "/retry") == ("", 2)
    assert [message["content"] for message in session.messages] == ["one", RECITED]


def test_a_file_goes_with_the_next_message(session: Session, notices: list[str], tmp_path: Path) -> None:
    notes, more = tmp_path / "my notes.txt", tmp_path / "more.txt"
    notes.write_bytes("\ufeff第一行\nsecond\n".encode())
    more.write_text("more")
    converse(session, f"/file {notes}", f"/file {more}", "what is it?", "and?")
    said = [message["content"] for message in session.messages[::2]]
    assert said == ["第一行\nsecond\n\nmore\n\nwhat is it?", "and?"]
    (tmp_path / "long.txt").write_text("word " * POSITIONS)
    (tmp_path / "huge.txt").write_bytes(bytes(5 * 1024**2))
    (tmp_path / "binary").write_bytes(b"\x80\x81\xfe")
    for name, message in [
        ("long.txt", "tokens are too many"),
        ("huge.txt", "too long"),
        ("binary", "invalid UTF-8"),
        ("missing", "no such file"),
        (".", "is not a file"),
        ("", "name a file"),
    ]:
        assert converse(session, f"/file {tmp_path / name}" if name else "/file") == ("", 2)
        assert message in notices[-1]
    converse(session, f"/file {more}", "/reset", "hello")
    assert session.messages[0]["content"] == "hello"


@pytest.mark.parametrize(
    ("locale", "word"), [("zh_CN.UTF-8", "命令"), ("en_GB.UTF-8", "slash"), ("C", "slash")]
)
def test_help_lists_each_command(
    session: Session, notices: list[str], monkeypatch: pytest.MonkeyPatch, locale: str, word: str
) -> None:
    from xverse.chat.translations import COMMANDS, translated

    monkeypatch.setenv("LC_ALL", locale)
    converse(session, "/help")
    assert all(any(line.startswith(name) for line in notices[-1].splitlines()) for name in COMMANDS)
    assert word in notices[-1] + translated("welcome")
    for command in COMMANDS:  # and each is one that the terminal knows
        converse(session, f"{command} ?" if command != "/exit" else command)
        assert "unknown command" not in notices[-1]


def test_params(session: Session, notices: list[str]) -> None:
    assert session.sampling.temperature == 0.3  # from the directory's generation_config.json
    assert session.sampling.top_k == CHAT.top_k  # not set there
    out, code = converse(session, "/params temperature=0 seed=7 top_p=1e-1", "/params")
    assert (out, code) == ("", 0)
    assert session.sampling == dataclasses.replace(session.sampling, temperature=0.0, seed=7, top_p=0.1)
    assert "temperature = 0.0" in notices[-1]
    assert "seed = 7" in notices[-1]
    before = session.sampling
    for line, message in [
        ("/params temprature=1", "did you mean 'temperature'"),
        ("/params temperature=-1", "temperature: -1.0 is out of range"),
        ("/params top_k=many", "top_k: expected int"),
        ("/params max_new_tokens=0", "max_new_tokens"),
        ("/params temperature", "expected key=value"),
        ("/params seed=[", "seed"),
    ]:
        assert converse(session, line) == ("", 2)
        assert message in notices[-1]
    assert session.sampling == before


def test_commands_that_cannot_be_followed(session: Session, notices: list[str], tmp_path: Path) -> None:
    for line, message in [
        ("/rest", "unknown command '/rest'; did you mean '/reset'?"),
        ("/save", "name a file"),
        ("/save x.json", "no conversation to save"),
        (f"/load {tmp_path / 'none.json'}", "no such file"),
    ]:
        assert converse(session, line) == ("", 2)
        assert message in notices[-1]
    assert converse(session, "/exit", "never read") == ("", 0)
    assert converse(session, "/help") == ("", 0)
    assert "/params" in notices[-1]


def test_an_interrupted_reply_is_kept_as_far_as_it_came(session: Session) -> None:
    reply = session.reply("hello")
    said = next(reply) + next(reply)
    reply.close()
    assert session.messages[-1] == {"role": "assistant", "content": said}
    assert not session.engine.busy
    unread = session.reply("never begun")
    unread.close()
    assert len(session.messages) == 2
    assert converse(session, "go on") == (RECITED + "\n", 0)
    assert len(session.messages) == 4


def test_a_failing_model_says_so_and_the_turn_is_dropped(session: Session, notices: list[str]) -> None:
    with torch.no_grad():
        session.engine.model.lm_head.weight[5] = torch.nan
    assert converse(session, "hello") == ("", 2)
    assert "not finite" in notices[-1]
    assert session.messages == []


def test_what_does_not_fit_the_context_is_announced(session: Session, notices: list[str]) -> None:
    half = "word " * (POSITIONS // 8)
    converse(session, half, half, half, half)
    assert any("oldest" in text and "rounds were left out" in text for text in notices)
    notices.clear()
    session.reset()
    out, _ = converse(session, "long " * POSITIONS)
    assert out == RECITED + "\n"
    assert any("tokens were cut" in text for text in notices)
    notices.clear()
    assert "".join(session.complete("x " * POSITIONS + "Say")) == RECITED
    assert any("first" in text and "tokens were left out" in text for text in notices)


def test_the_token_limit_is_announced(session: Session, notices: list[str]) -> None:
    session.sampling = session.sampling.changed({"max_new_tokens": 3}, "test")
    out, _ = converse(session, "hello")
    assert RECITED.startswith(out.rstrip("\n"))
    assert "max_new_tokens = 3" in notices[-1]

    from xverse.chat.terminal import show

    both = io.StringIO()  # as in a terminal: the notice is a line of its own
    session.notify = lambda text: print(f"[{text}]", file=both)
    show(session, session.reply("hello"), both)
    assert [line[:1] == "[" for line in both.getvalue().splitlines()] == [False, True]


def test_a_terminal_never_sees_control_characters(session: Session) -> None:
    from xverse.chat.terminal import show

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, pipe = Screen(), io.StringIO()
    pieces = ["a\x1b[31m", "\x07b\tc\n你\x9b好\r"]
    show(session, (piece for piece in pieces), screen)
    show(session, (piece for piece in pieces), pipe)
    assert screen.getvalue() == "a[31mb\tc\n你好\n"
    assert pipe.getvalue() == "".join(pieces) + "\n"


def test_generation_config_rules() -> None:
    assert from_generation_config({}, CHAT) == CHAT
    assert from_generation_config({"do_sample": False, "temperature": 0.9}, CHAT).temperature == 0
    chosen = from_generation_config({"top_k": None, "top_p": 0.5, "bos_token_id": 2}, CHAT)
    assert chosen == dataclasses.replace(CHAT, top_p=0.5)
    with pytest.raises(UserError, match=r"top_p: 7\.0"):
        from_generation_config({"top_p": 7}, CHAT)
    with pytest.raises(UserError, match="repetition_penalty"):
        SamplingParams(repetition_penalty=0)
