"""Generation: requests in, events out. Chat, server and evaluation use nothing else of it.

Names load on first use, so that ``sampling_params`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xverse.engine.engine import Engine, Stats
    from xverse.engine.request import Constraint, Event, FinishReason, Request, TokenLogprob
    from xverse.engine.sampling_params import SamplingParams
    from xverse.engine.speculation import Speculation

_HOME = {
    "Engine": "engine",
    "Stats": "engine",
    "Constraint": "request",
    "Event": "request",
    "FinishReason": "request",
    "Request": "request",
    "TokenLogprob": "request",
    "SamplingParams": "sampling_params",
    "Speculation": "speculation",
}

__all__ = [
    "Constraint",
    "Engine",
    "Event",
    "FinishReason",
    "Request",
    "SamplingParams",
    "Speculation",
    "Stats",
    "TokenLogprob",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'xverse.engine' has no attribute '{name}'")
    return getattr(importlib.import_module(f"xverse.engine.{_HOME[name]}"), name)
