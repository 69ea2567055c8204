"""Validation: bits per byte of held-out text, by language."""

from __future__ import annotations

import math

import torch

from xverse.data.feed import PretrainFeed
from xverse.model import XverseForCausalLM
from xverse.train.loop import sum_loss
from xverse.train.parallel import Replica


@torch.no_grad()
def bits_per_byte(
    model: XverseForCausalLM | Replica,
    feed: PretrainFeed,
    *,
    batch_size: int,
    max_tokens: int | None,
    dtype: str,
) -> dict[str, float]:
    """Bits per UTF-8 byte of each source's held-out text, preceded by "all", the plain mean over sources;
    empty where no text is held out.

    This is the loss in nats / ln 2 / the bytes of the scored tokens. Unlike the loss per token it compares
    models with different tokenizers. ``max_tokens`` bounds the text of one source.
    """
    figures: dict[str, float] = {}
    for name in feed.valid_names:
        nats, size = 0.0, 0
        for batch, scored_bytes in feed.valid_batches(name, batch_size, max_tokens):
            nats += sum_loss(model, batch.tokens, batch.targets, batch.document_ids, dtype).item()
            size += scored_bytes
        if size:
            figures[name] = nats / math.log(2) / size
    return {"all": sum(figures.values()) / len(figures), **figures} if figures else {}
