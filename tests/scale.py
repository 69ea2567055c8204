"""``make test`` runs what fits some minutes of two cores; ``make test-all`` runs all, with more examples."""

from __future__ import annotations

import os

ALL = bool(os.environ.get("XVERSE_TEST_ALL"))


def examples(count: int) -> int:
    """How many examples Hypothesis tries of the ``count`` of ``make test-all``."""
    return count if ALL else max(5, count // 3)
