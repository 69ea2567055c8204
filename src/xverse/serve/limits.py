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

    def __init__(self, inner: Constraint | None, stop_ids: Sequence[int], least: int) -> None:
        self.inner = inner
        self._stop_ids = list(stop_ids)
        self._left = least

    def apply(self, logits: Tensor) -> Tensor:
        """``logits`` float32 [V] → the same with -inf for every forbidden token."""
        if self.inner is not None:
            logits = self.inner.apply(logits)
        if self._left <= 0:
            return logits
        longer = logits.clone()
        longer[[token for token in self._stop_ids if token < len(longer)]] = -torch.inf
        return longer if bool((longer > -torch.inf).any()) else logits

    def accept(self, token_id: int) -> None:
        self._left -= 1
        if self.inner is not None:
            self.inner.accept(token_id)

    def forced(self) -> Sequence[int]:
        return [] if self.inner is None else self.inner.forced()
