"""Stop strings in streamed text: what could be the beginning of one is held back until it is decided."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Cuts a stream of text before the stop string that is complete first.

    Of several that end in the same place the longest counts. However the text is divided into pieces, the
    same text comes out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string was met; after one, push no more."""
        if not self._stop:
            return piece, False
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(self._begun(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back, when the stream ends without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that ``stop`` begins with, short of all of it."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
