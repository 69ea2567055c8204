"""``min_tokens``: a reply does not end before it has so many tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xverse.engine import Constraint


class MinTokens:
    """Forbids ``stop_ids`` for the first ``least`` tokens; implements ``engine.Constraint``.

    ``inner`` is another constraint of the reply. Where it allows only the end, the reply ends.
    """

    def __init__(
        self, inner: Constraint | None, stop_ids: Sequence[int], least: int, vocab_size: int
    ) -> None:
        self.inner = inner
        self._size = vocab_size
        self._stop_ids = list(stop_ids)
        self._left = least

    def allowed(self) -> Tensor:
        """The tokens that are not forbidden, bool [V]."""
        mask = torch.ones(self._size, dtype=torch.bool) if self.inner is None else self.inner.allowed()
        if self._left <= 0:
            return mask
        longer = mask.clone()
        longer[[token for token in self._stop_ids if token < self._size]] = False
        return longer if bool(longer.any()) else mask

    def accept(self, token_id: int) -> None:
        self._left -= 1
        if self.inner is not None:
            self.inner.accept(token_id)

    def forced(self) -> Sequence[int]:
        return [] if self.inner is None else self.inner.forced()
