from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xverse.engine.stop import StopText

letters = st.text("abc好", max_size=30)


def run(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopText(stop)
    out = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out += text
        if stopped:
            return out, True
    return out + matcher.finish(), False


def reference(stop: list[str], text: str) -> tuple[str, bool]:
    """Reference: read character by character; the stop text that is complete first cuts."""
    for end in range(1, len(text) + 1):
        starts = [end - len(item) for item in stop if text[:end].endswith(item)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    stop=st.lists(st.text("abc好", min_size=1, max_size=4), max_size=3), pieces=st.lists(letters, max_size=8)
)
def test_any_division_gives_the_same_text(stop: list[str], pieces: list[str]) -> None:
    assert run(stop, pieces) == reference(stop, "".join(pieces))


@pytest.mark.parametrize(
    ("piece", "emitted"), [("hello\nHum", "hello"), ("hello\nHun", "hello\nHun"), ("\n", ""), ("\nHuman", "")]
)
def test_only_what_may_be_a_stop_string_is_held_back(piece: str, emitted: str) -> None:
    assert StopText(["\nHuman:"]).push(piece) == (emitted, False)


def test_the_stop_text_that_occurred_is_named() -> None:
    matcher = StopText(["late", "x", "ab"])
    assert [matcher.push(piece) for piece in ("1 a", "b late")] == [("1 ", False), ("", True)]
    assert matcher.found == "ab"
    assert StopText(["x"]).found is None
