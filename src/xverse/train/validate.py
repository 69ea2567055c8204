"""Validation: bits per byte of held-out text, by language."""

from __future__ import annotations

import itertools
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
    models with different tokenizers. ``max_tokens`` bounds the text of one source. Data-parallel processes
    share the batches; each gets all figures.
    """
    replica = model if isinstance(model, Replica) else Replica(model)
    groups, own = replica.layout.data, replica.layout.place(replica.world.rank)[1]
    nats = dict.fromkeys(feed.valid_names, 0.0)
    sizes = dict.fromkeys(feed.valid_names, 0)
    batches = (
        (name, *item)
        for name in feed.valid_names
        for item in feed.valid_batches(name, batch_size, max_tokens)
    )
    while turn := list(itertools.islice(batches, groups)):
        for name, _, scored_bytes in turn:
            sizes[name] += scored_bytes
        # A group without a batch computes one all the same: sharded models are gathered by all together.
        name, batch, _ = turn[min(own, len(turn) - 1)]
        loss = sum_loss(replica, batch.tokens, batch.targets, batch.document_ids, dtype).item()
        if own < len(turn) and replica.leads:
            nats[name] += loss
    totals = replica.world.sum(*nats.values()) if nats else []
    figures = {
        name: total / math.log(2) / sizes[name]
        for name, total in zip(nats, totals, strict=True)
        if sizes[name]
    }
    return {"all": sum(figures.values()) / len(figures), **figures} if figures else {}
