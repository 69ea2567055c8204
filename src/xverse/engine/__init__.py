"""Generation: requests in, events out. Chat, server and evaluation use nothing else of it.

Names load on first use, so that ``sampling_params`` alone does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xverse.lazy import lazy

if TYPE_CHECKING:
    from xverse.engine.adapters import Adapter, AdapterLoader
    from xverse.engine.engine import Engine
    from xverse.engine.request import Constraint, Event, FinishReason, Request, Stats, TokenLogprob
    from xverse.engine.sampling_params import SamplingParams
    from xverse.engine.speculation import Speculation

_MODULES = {
    "xverse.engine.engine": "Engine",
    "xverse.engine.adapters": "Adapter AdapterLoader",
    "xverse.engine.request": "Constraint Event FinishReason Request Stats TokenLogprob",
    "xverse.engine.sampling_params": "SamplingParams",
    "xverse.engine.speculation": "Speculation",
}
__all__ = " ".join(_MODULES.values()).split()
__getattr__ = lazy(__name__, _MODULES)
