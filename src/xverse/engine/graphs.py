"""Decoding on CUDA: the forward pass for a few tokens, captured once as a graph and replayed.

A step of one token launches hundreds of kernels that take microseconds each; launched one by one from Python
they would leave the device idle most of the time. A graph has fixed shapes, so steps are padded to the next
power of two in tokens and in blocks of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xverse.engine.cache import BLOCK_SIZE, PagedCache, RaggedContext
from xverse.kernels.paged_attention import PagedLayer
from xverse.model.transformer import XverseForCausalLM


@dataclass
class _Inputs:
    """A graph's static inputs: an attention context of N single queries over W blocks each."""

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


class DecodeGraphs:
    """Runs steps of up to ``most_tokens`` single queries. A graph is captured when its shape first occurs.

    Without CUDA the padded steps run eagerly, for tests.
    """

    def __init__(self, model: XverseForCausalLM, cache: PagedCache, most_tokens: int = 64) -> None:
        self.most_tokens = most_tokens
        self._model = model.model
        self._cache = cache
        self._inputs: dict[tuple[int, int], _Inputs] = {}
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens: Tensor, context: RaggedContext) -> Tensor:
        """``tokens`` int64 [N] → normed hidden states [N, D]."""
        count = len(tokens)
        shape = _above(count), min(_above(context.longest_table), self._cache.tables.shape[1])
        if shape not in self._inputs:
            self._inputs[shape] = self._blank(*shape)
        inputs = self._inputs[shape]
        width = min(context.table.shape[1], shape[1])
        inputs.tokens[:count] = tokens
        inputs.positions[0, :count] = context.positions[0]
        inputs.slots[:count] = context.slots
        inputs.table[:count, :width] = context.table[:, :width]
        inputs.lengths[:count] = context.lengths
        inputs.slots[count:] = self._cache.scratch * BLOCK_SIZE
        inputs.table[count:] = self._cache.scratch
        inputs.lengths[count:] = 1
        if inputs.rope_lengths is not None and context.rope_lengths is not None:
            inputs.rope_lengths[0, :count] = context.rope_lengths[0]
        inputs.positions[0, count:] = 0
        if self._cache.device.type != "cuda":
            return self._forward(inputs)[:count]
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(inputs)
        graph, hidden = self._graphs[shape]
        graph.replay()
        return hidden[:count].clone()

    def _blank(self, tokens: int, blocks: int) -> _Inputs:
        device = self._cache.device
        return _Inputs(
            tokens=torch.zeros(tokens, dtype=torch.long, device=device),
            positions=torch.zeros(1, tokens, dtype=torch.long, device=device),
            slots=torch.zeros(tokens, dtype=torch.long, device=device),
            table=torch.zeros(tokens, blocks, dtype=torch.int32, device=device),
            lengths=torch.ones(tokens, dtype=torch.int32, device=device),
            rope_lengths=torch.ones(1, tokens, dtype=torch.long, device=device)
            if self._cache.rope_depends_on_length
            else None,
            layers=self._cache.layers,
        )

    def _forward(self, inputs: _Inputs) -> Tensor:
        return self._model(inputs.tokens[None], inputs)[0]

    def _capture(self, inputs: _Inputs) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Warm up on a side stream, as PyTorch requires, then capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self._forward(inputs)
        return graph, hidden


def _above(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
