"""Decoding on CUDA: the forward pass for a few tokens, recorded as a graph and replayed.

A step of one token launches hundreds of kernels that take microseconds each; launched one by one from Python
they would leave the device idle most of the time. A graph has a fixed number of tokens, so that steps are
padded to the next recorded one. The block table is always as wide as the longest text: attention reads no
further than the positions of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xverse.device import guard, is_lost
from xverse.engine.cache import PagedCache, RaggedContext
from xverse.engine.ranks import ranks_of
from xverse.kernels.paged_attention import PagedLayer
from xverse.log import notice
from xverse.model.transformer import XverseForCausalLM

MOST_TOKENS = 64


def recorded(model: XverseForCausalLM, cache: PagedCache) -> DecodeGraphs | None:
    """The graphs of a CUDA device; None on others, for a model that is divided over processes or has routed
    experts, whose products depend on the tokens, and where recording fails, which is reported."""
    if cache.device.type != "cuda" or model.config.num_experts or ranks_of(model) is not None:
        return None
    graphs = DecodeGraphs(model, cache)
    try:
        graphs.record()
    except RuntimeError as error:
        if is_lost(error):
            raise
        notice(f"{cache.device}: steps run without CUDA graphs: {' '.join(str(error).split())[:200]}")
        torch.cuda.empty_cache()
        return None
    return graphs


def sizes(most: int) -> list[int]:
    """The numbers of tokens to record: 1, 2, 4, 8, then multiples of eight, up to ``most``."""
    steps = [1, 2, 4, *range(8, MOST_TOKENS + 1, 8)]
    return [size for index, size in enumerate(steps) if index == 0 or steps[index - 1] < most]


@dataclass
class _Inputs:
    """Static inputs: an attention context of N single queries over W blocks each."""

    tokens: Tensor  # int64 [N]
    positions: Tensor  # int64 [1, N]
    slots: Tensor  # int64 [N]
    table: Tensor  # int32 [N, W]
    lengths: Tensor  # int32 [N]
    rope_lengths: Tensor | None  # int64 [1, N]
    layers: list[PagedLayer]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [N, H, head_dim]
        pages = self.layers[layer]
        pages.append(k, v, self.slots)
        return pages.attend(q, self.table, self.lengths).transpose(0, 1)[None]

    def first(self, count: int) -> _Inputs:
        """Views of the first ``count`` queries."""
        return _Inputs(
            tokens=self.tokens[:count],
            positions=self.positions[:, :count],
            slots=self.slots[:count],
            table=self.table[:count],
            lengths=self.lengths[:count],
            rope_lengths=None if self.rope_lengths is None else self.rope_lengths[:, :count],
            layers=self.layers,
        )


class DecodeGraphs:
    """Runs steps of up to ``most_tokens`` single queries, padded; eagerly until ``record`` has recorded all
    graphs, the largest first, in one memory pool."""

    def __init__(self, model: XverseForCausalLM, cache: PagedCache, most_tokens: int = MOST_TOKENS) -> None:
        self._model = model.model
        self._cache = cache
        self._sizes = sizes(most_tokens)
        self.most_tokens = self._sizes[-1]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        device, most = cache.device, self.most_tokens
        self._inputs = _Inputs(
            tokens=torch.zeros(most, dtype=torch.long, device=device),
            positions=torch.zeros(1, most, dtype=torch.long, device=device),
            slots=torch.full((most,), cache.scratch * cache.block_size, device=device),
            table=torch.full((most, cache.tables.shape[1]), cache.scratch, dtype=torch.int32, device=device),
            lengths=torch.ones(most, dtype=torch.int32, device=device),
            rope_lengths=torch.ones(1, most, dtype=torch.long, device=device)
            if cache.rope_depends_on_length
            else None,
            layers=cache.layers,
        )

    @torch.inference_mode()
    def record(self) -> None:
        """Record the graphs of all sizes. Each runs twice before, as PyTorch requires."""
        with guard(self._cache.device):
            pool = None
            stream = torch.cuda.Stream()
            for size in reversed(self._sizes):
                inputs = self._inputs.first(size)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        self._forward(inputs)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    hidden = self._forward(inputs)
                pool = pool or graph.pool()
                self._graphs[size] = graph, hidden

    def __call__(self, tokens: Tensor, context: RaggedContext) -> Tensor:
        """``tokens`` int64 [N] → normed hidden states [N, D]."""
        count = len(tokens)
        size = next(size for size in self._sizes if size >= count)
        inputs, cache = self._inputs.first(size), self._cache
        inputs.tokens[:count] = tokens
        inputs.positions[0, :count] = context.positions[0]
        inputs.slots[:count] = context.slots
        inputs.table[:count, : context.table.shape[1]] = context.table
        inputs.lengths[:count] = context.lengths
        if inputs.rope_lengths is not None and context.rope_lengths is not None:
            inputs.rope_lengths[0, :count] = context.rope_lengths[0]
        if count < size:
            inputs.slots[count:] = cache.scratch * cache.block_size
            inputs.table[count:, 0] = cache.scratch
            inputs.lengths[count:] = 1
            inputs.positions[0, count:] = 0
        if size not in self._graphs:
            return self._forward(inputs)[:count]
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden[:count].clone()

    def _forward(self, inputs: _Inputs) -> Tensor:
        return self._model(inputs.tokens[None], inputs)[0]
