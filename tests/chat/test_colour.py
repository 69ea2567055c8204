"""Colours add escape sequences and nothing else."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xverse.chat.colour import Markdown, colours

pieces = st.lists(st.text(alphabet="ab*`~# \t\n你_<>&\\[]()$|-", max_size=12), max_size=12)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@given(pieces)
def test_no_character_is_lost(parts: list[str]) -> None:
    markdown = Markdown()
    coloured = "".join(map(markdown.push, parts)) + markdown.finish()
    assert plain(coloured) == "".join(parts)
    for line in coloured.split("\n"):  # a style ends with its line
        assert "\x1b" not in line or line.rindex("\x1b[0m") == line.rindex("\x1b")


@pytest.mark.parametrize(
    ("text", "styled"),
    [
        ("## Title\nbody", "\x1b[1;35m## Title\x1b[0m\nbody"),
        ("#include <iostream>", "#include <iostream>"),
        ("a `b < c` d", "a \x1b[36m`b < c`\x1b[0m d"),
        ("a **b** * c", "a \x1b[1m**b**\x1b[0m * c"),
        (
            "```c\n# 1 **x**\n```\nend",
            "\x1b[36m```c\x1b[0m\n\x1b[36m# 1 **x**\x1b[0m\n\x1b[36m```\x1b[0m\nend",
        ),
        ("2 * 3 ** 4", "2 * 3 \x1b[1m** 4\x1b[0m"),
    ],
)
def test_styles(text: str, styled: str) -> None:
    for size in (1, 3, len(text)):
        markdown = Markdown()
        parts = [markdown.push(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join(parts) + markdown.finish() == styled


def test_only_a_terminal_without_no_color_is_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colours(Screen())
    assert not colours(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not colours(Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours(Screen())
