"""One thing at a time: actions on the page take turns in the browser, and a reply can be ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

# What changes the conversations has its turn in the browser alone. Each step there reads the page, asks the
# server and writes the page: two at once undo one another. Gradio's own ``cancels`` is no help: it does not
# wait for the reply, whose last words then arrive in the next conversation, and does nothing to one that the
# server has not yet acknowledged.
_TURN = """async (...inputs) => {
  const turns = (window.xverseTurns ??= {last: Promise.resolve()});
  const before = turns.last;
  let over;
  turns.last = new Promise((done) => { over = done; });
  %s
  turns.over = over;
  return inputs;
}"""
AFTER_REPLY = _TURN % "await before;"
# Again and again: a reply that was asked for shows its button only after some steps.
ENDING_REPLY = (
    _TURN
    % """const end = () => document.querySelector("#message [data-testid=stop-button]")?.click();
  end();
  const ending = setInterval(end, 50);
  await before;
  clearInterval(ending);"""
)
# The page is open before it knows what the browser keeps: a message may be there already.
WIDTH = f"async () => {{ await ({AFTER_REPLY})(); return window.innerWidth; }}"
OVER = "() => { window.xverseTurns.over(); }"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
Step = tuple[Callable[..., Any], Any, Any]  # a function, its inputs and its outputs


class Replies:
    """The one that each browser window is given, if any, so that it can be ended."""

    def __init__(self) -> None:
        self._endings: dict[str | None, asyncio.Event] = {}

    @contextmanager
    def begin(self, window: gr.Request) -> Iterator[asyncio.Event]:
        ending = self._endings[window.session_hash] = asyncio.Event()
        try:
            yield ending
        finally:
            self._endings.pop(window.session_hash, None)

    async def end(self, window: gr.Request) -> None:
        """As if what it has said so far were all."""
        if ending := self._endings.get(window.session_hash):
            ending.set()


async def until_ending(ending: asyncio.Event, found: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """What is found before ``ending``, which need not wait for the next piece."""
    end = asyncio.create_task(ending.wait())
    piece: asyncio.Future[Any] | None = None
    try:
        while not ending.is_set():
            piece = asyncio.ensure_future(anext(found, None))
            await asyncio.wait((piece, end), return_when=asyncio.FIRST_COMPLETED)
            if not piece.done() or piece.result() is None:
                return
            yield piece.result()
    finally:
        end.cancel()
        if piece is not None and piece.cancel():
            await asyncio.wait((piece,))


def follow(event: Any, *steps: Step) -> Any:
    """Each step when the one before has succeeded; where one fails, the next action has its turn."""
    for function, inputs, outputs in steps:
        event.failure(None, None, None, js=OVER, queue=False, **QUIET)
        event = event.success(function, inputs, outputs, queue=False, **QUIET)
    return event


def end_turn(event: Any) -> None:
    """The next action has its turn after ``event``, whether it succeeds or fails."""
    for ended in (event.success, event.failure):
        ended(None, None, None, js=OVER, queue=False, **QUIET)
