"""Stop texts in a stream: a possible beginning of one is held back until it is decided."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Cuts a stream before the stop text that is complete first; of several that end together, the longest.

    The result does not depend on how the text is divided into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None  # the one that occurred

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop text occurred; after that, do not push again."""
        if not self._stop:
            return piece, False
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            _, at, self.found = min(ends)
            return text[:at], True
        keep = max(self._partial(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """The text held back, at the end of a stream without a stop text."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _partial(text: str, stop: str) -> int:
        """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
