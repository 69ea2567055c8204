"""Actions on the page run one at a time, in the browser; a running reply can be ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

# Actions that change conversations take turns, serialised in the browser. Each step reads the page, calls the
# server and writes the page, so two at once would overwrite each other. Gradio's ``cancels`` does not help:
# it does not wait for the reply, whose last text then arrives in the next conversation, and it ignores a
# reply that the server has not acknowledged yet.
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
# Repeatedly, because the button of a requested reply appears only after some steps.
ENDING_REPLY = (
    _TURN
    % """const end = () => document.querySelector("#message [data-testid=stop-button]")?.click();
  end();
  const ending = setInterval(end, 50);
  await before;
  clearInterval(ending);"""
)
# The page is usable before the browser's data has arrived; a message may already have been sent.
WIDTH = f"async () => {{ await ({AFTER_REPLY})(); return window.innerWidth; }}"
OVER = "() => { window.xverseTurns.over(); }"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
Step = tuple[Callable[..., Any], Any, Any]  # function, inputs, outputs


class Replies:
    """The running reply of each browser window, if any, so that it can be ended."""

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
        """End the window's reply; the text so far is kept."""
        if ending := self._endings.get(window.session_hash):
            ending.set()


async def until_ending(ending: asyncio.Event, source: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The items of ``source`` until ``ending`` is set, without waiting for the next item."""
    end = asyncio.create_task(ending.wait())
    item: asyncio.Future[Any] | None = None
    try:
        while not ending.is_set():
            item = asyncio.ensure_future(anext(source, None))
            await asyncio.wait((item, end), return_when=asyncio.FIRST_COMPLETED)
            if not item.done() or item.result() is None:
                return
            yield item.result()
    finally:
        end.cancel()
        if item is not None and item.cancel():
            await asyncio.wait((item,))


def follow(event: Any, *steps: Step) -> Any:
    """Chain ``steps``, each after the success of the previous one; a failure ends the turn."""
    for function, inputs, outputs in steps:
        event.failure(None, None, None, js=OVER, queue=False, **QUIET)
        event = event.success(function, inputs, outputs, queue=False, **QUIET)
    return event


def end_turn(event: Any) -> None:
    """End the turn after ``event``, whether it succeeds or fails."""
    for ended in (event.success, event.failure):
        ended(None, None, None, js=OVER, queue=False, **QUIET)
