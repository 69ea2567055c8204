"""Responses that were given, so that later requests can continue or read them. In memory, within a bound."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """``context`` is the conversation up to the response's input, ``input`` included, as items; ``owner`` the
    fingerprint of the API key that may read it."""

    response: dict[str, Any]
    input: list[dict[str, Any]]
    context: list[dict[str, Any]]
    owner: str | None
    size: int

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return [*self.context, *self.response["output"]]


class ResponseStore:
    """The latest responses, up to ``most_bytes`` of JSON text in all; the oldest ones are dropped first."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._bytes = most_bytes, 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(
        self,
        response: dict[str, Any],
        input: list[dict[str, Any]],
        context: list[dict[str, Any]],
        owner: str | None,
    ) -> None:
        size = len(json.dumps([response, input, context], ensure_ascii=False).encode(errors="replace"))
        self._stored[response["id"]] = Stored(response, input, context, owner, size)
        self._bytes += size
        while self._bytes > self._most:
            _, dropped = self._stored.popitem(last=False)
            self._bytes -= dropped.size

    def get(self, name: str, owner: str | None) -> Stored | None:
        found = self._stored.get(name)
        return found if found is not None and found.owner == owner else None

    def item(self, name: str, owner: str | None) -> dict[str, Any] | None:
        """An item of a response's input or output."""
        for stored in reversed(self._stored.values()):
            if stored.owner == owner:
                for item in (*stored.response["output"], *stored.input):
                    if item["id"] == name:
                        return item
        return None

    def delete(self, name: str, owner: str | None) -> bool:
        found = self.get(name, owner)
        if found is not None:
            del self._stored[name]
            self._bytes -= found.size
        return found is not None
