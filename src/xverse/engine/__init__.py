"""Generation: requests in, events out. Chat, server and evaluation know nothing else of it."""

from xverse.engine.engine import Engine, Stats
from xverse.engine.request import Constraint, Event, FinishReason, Request, Sampling, TokenLogprob
from xverse.engine.speculation import Speculation

__all__ = [
    "Constraint",
    "Engine",
    "Event",
    "FinishReason",
    "Request",
    "Sampling",
    "Speculation",
    "Stats",
    "TokenLogprob",
]
