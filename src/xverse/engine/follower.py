"""What passes between the processes of tensor parallelism: rank 0 schedules, sends the inputs of every
forward pass, and chooses tokens; the others compute the same pass.

Orders are lists of integers: how many tokens, which, and for each segment of the step its sequence's row of
the block table, what is written of it, and the blocks that are new.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xverse.config import UserError
from xverse.device import guard
from xverse.engine.cache import PagedCache, RaggedContext, SequenceCache
from xverse.engine.engine import Engine
from xverse.engine.ranks import Ranks, join

_STEP, _LOGITS = 0, 1


def lead(engine: Engine, ranks: Ranks) -> None:
    """Make the forward passes of rank 0's engine those of all processes."""
    sent: dict[int, list[int]] = {}  # the blocks of each row of the table that the others know

    def before_step(module: nn.Module, inputs: tuple[Tensor, RaggedContext]) -> None:
        tokens, context = inputs
        order = [_STEP, tokens.shape[1], *tokens[0].tolist(), len(context.segments)]
        for sequence, count in context.segments:
            known = sent.get(sequence.row, [])
            kept = len(known) if sequence.blocks[: len(known)] == known else 0
            sent[sequence.row] = [*sequence.blocks]
            new = sequence.blocks[kept:]
            order += (sequence.row, sequence.length, sequence.longest, count, kept, len(new), *new)
        ranks.order(order)

    def before_logits(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden = inputs[0].contiguous()
        ranks.order([_LOGITS, len(hidden)])
        return (ranks.from_first(hidden),)

    engine.model.model.register_forward_pre_hook(before_step)
    engine.model.lm_head.register_forward_pre_hook(before_logits)


@torch.inference_mode()
def follow(engine: Engine, ranks: Ranks) -> None:
    """Compute what rank 0 orders, until it ends."""
    model, cache = engine.model, engine._cache
    size, dtype = model.config.hidden_size, model.model.norm.weight.dtype
    mirrors = [_Mirror(cache, row) for row in range(len(cache.tables))]
    with guard(ranks.device):
        while True:
            kind, count, *rest = ranks.order()
            if kind == _LOGITS:
                model.lm_head(ranks.from_first(torch.empty(count, size, dtype=dtype, device=ranks.device)))
                continue
            tokens = torch.tensor(rest[:count]).to(ranks.device, non_blocking=True)
            segments: list[tuple[SequenceCache, int]] = []
            at = count + 1
            for _ in range(rest[count]):
                row, length, longest, computed, kept, new = rest[at : at + 6]
                mirrors[row].update(length, longest, kept, rest[at + 6 : at + 6 + new])
                segments.append((mirrors[row], computed))
                at += 6 + new
            model.model(tokens[None], RaggedContext(segments))


class _Mirror(SequenceCache):
    """Rank 0's ``SequenceCache`` that has ``row`` of the block table."""

    def __init__(self, cache: PagedCache, row: int) -> None:
        self.cache, self.row = cache, row
        self.blocks = []

    def update(self, length: int, longest: int, kept: int, new: list[int]) -> None:
        self.length, self.longest = length, longest
        del self.blocks[kept:]
        self._add(new)


def main(order: str) -> int:
    """One of the processes that ``Ranks.start`` starts."""
    from xverse.engine.load import load_engine

    values: dict[str, Any] = json.loads(order)
    settings = values["settings"]
    ranks = join(values["rank"], values["count"], Path(values["folder"]), settings.pop("device"))
    try:
        follow(load_engine(settings.pop("model"), ranks=ranks, **settings).engine, ranks)
    except UserError as error:
        time.sleep(5)  # rank 0 fails with the same message
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
