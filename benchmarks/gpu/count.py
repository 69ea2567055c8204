"""``python -m benchmarks gpu-count``: launches and bytes of the 7B model on CUDA, counted on fake tensors."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.trace import Counter, pretended_gpu, size
from xverse.formats.schemes import set_layer
from xverse.kernels.inference import use_kernels
from xverse.kernels.linear import QuantLinear
from xverse.kernels.paged_attention import PAGE, PagedLayer
from xverse.model import SHAPES, XverseForCausalLM

LAYERS = 2  # that are traced; all layers are alike


def model_on_gpu(bits: int = 16, layers: int = LAYERS) -> XverseForCausalLM:
    """The 7B shape in bfloat16 or with quantised linears (head: 8 bits), under ``pretended_gpu``."""
    config = dataclasses.replace(SHAPES["7b"], num_hidden_layers=layers)
    with torch.device("meta"):
        model = XverseForCausalLM(config)
        for name, module in list(model.named_modules()):
            if bits < 16 and isinstance(module, nn.Linear):
                own = 8 if name == "lm_head" else bits
                set_layer(model, name, QuantLinear(module.in_features, module.out_features, own, 128))
    for module in model.modules():
        for key, weight in list(module.named_parameters(recurse=False)):
            empty = torch.empty(weight.shape, dtype=torch.bfloat16, device="cuda")
            setattr(module, key, nn.Parameter(empty, requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
    use_kernels(model)
    return model


class Queries:
    """Attention of ``batch`` decoding sequences of ``length`` positions, as the engine's graphs run it."""

    def __init__(self, config: Any, batch: int, length: int, int8: bool = False, page: int = PAGE) -> None:
        heads, head_dim = config.num_attention_heads, config.head_dim
        shape = (-(-batch * length // page), config.num_hidden_layers, 2, heads, page)
        data = torch.empty(*shape, head_dim, dtype=torch.int8 if int8 else torch.bfloat16, device="cuda")
        scales = torch.empty(shape, device="cuda") if int8 else None
        self.layers = [
            PagedLayer(
                data[:, layer, 0],
                data[:, layer, 1],
                None if scales is None else scales[:, layer, 0],
                None if scales is None else scales[:, layer, 1],
            )
            for layer in range(config.num_hidden_layers)
        ]
        self.positions = torch.zeros(1, batch, dtype=torch.int64, device="cuda")
        self.slots = torch.zeros(batch, dtype=torch.int64, device="cuda")
        self.table = torch.zeros(batch, 8192 // page, dtype=torch.int32, device="cuda")
        self.lengths = torch.ones(batch, dtype=torch.int32, device="cuda")
        vector = head_dim + 4 if int8 else 2 * head_dim
        self.read = 2 * heads * vector * batch * length * config.num_hidden_layers

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        self.layers[layer].append(k, v, self.slots)
        return self.layers[layer].attend(q, self.table, self.lengths).transpose(0, 1)[None]


class Chunk(Queries):
    """A chunk of ``tokens`` of one prompt that ends at position ``length``."""

    def __init__(self, config: Any, tokens: int, length: int, **options: Any) -> None:
        super().__init__(config, 1, length, **options)
        self.start = length - tokens
        self.positions = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
        self.slots = torch.zeros(tokens, dtype=torch.int64, device="cuda")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        self.layers[layer].append(k, v, self.slots)
        return self.layers[layer].prefill(q, self.table[0], self.start).transpose(0, 1)[None]


@dataclasses.dataclass(frozen=True)
class Count:
    """Of a step of the whole model; ``ideal`` bytes are each weight once and each position read once."""

    launches: int
    bytes: float
    ideal: float

    @property
    def ratio(self) -> float:
        return self.bytes / self.ideal


def counted(model: XverseForCausalLM, context: Queries, rows: int) -> Count:
    """A step over the ``context``'s tokens, with logits of the last ``rows``."""
    tokens = torch.zeros(context.positions.shape, dtype=torch.int64, device="cuda")
    layers = len(context.layers)
    positions = context.read // (layers * context.layers[0].keys.shape[1])
    vector = context.layers[0].head_dim * context.layers[0].keys.itemsize
    vector += 4 if context.layers[0].key_scales is not None else 0
    with Counter(positions=positions // (2 * vector)) as body:
        hidden = model.model(tokens, context)
    with Counter() as head:
        model.lm_head(hidden[:, -rows:])
    scale = SHAPES["7b"].num_hidden_layers / layers
    weights = sum(size(x) for x in model.model.layers.state_dict().values())
    ideal = scale * (weights + context.read) + sum(size(x) for x in model.lm_head.state_dict().values())
    return Count(round(scale * body.launches) + head.launches, scale * body.bytes + head.bytes, ideal)


CASES = ((16, False, 256), (16, False, 32), (16, True, 32), (8, False, 256), (4, False, 256))
DECODING = ((1, 2048), (8, 1024), (64, 512), (64, 1024))


def arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    with pretended_gpu():
        for bits, int8, page in CASES:
            model = model_on_gpu(bits)
            for batch, length in DECODING:
                context = Queries(model.config, batch, length, int8, page)
                rows.append((f"decode {batch} × {length}", bits, int8, page, counted(model, context, batch)))
            for tokens, length in ((512, 512), (2048, 4096)):
                chunk = Chunk(model.config, tokens, length, int8=int8, page=page)
                rows.append((f"prefill {tokens} to {length}", bits, int8, page, counted(model, chunk, 1)))
    print("| step | weights | cache | page | launches | GB moved | ideal GB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, bits, int8, page, count in rows:
        print(
            f"| {name} | {f'INT{bits}' if bits < 16 else 'bf16'} | {'int8' if int8 else 'bf16'} | {page} | "
            f"{count.launches:,} | {count.bytes / 1e9:.1f} | {count.ideal / 1e9:.1f} | {count.ratio:.2f} |"
        )
    return {"worst decode ratio": max(row[4].ratio for row in rows if row[0].startswith("decode"))}
