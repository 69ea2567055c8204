"""Generation: requests in, events out. Chat, server and evaluation know nothing else of it."""

from xverse.engine.engine import Engine
from xverse.engine.request import Event, FinishReason, Request, Sampling

__all__ = ["Engine", "Event", "FinishReason", "Request", "Sampling"]
