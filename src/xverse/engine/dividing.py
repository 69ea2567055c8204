"""Tensor parallelism for inference: each process keeps its part of every matrix, plain or quantised.

The rules are those of training (``plan/layout.py``). Between the layers every process holds the same hidden
states, and it computes all of the residual stream and the norms.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from xverse.config import UserError
from xverse.engine.ranks import Ranks
from xverse.formats.mapped import keep_in_file
from xverse.hardware import file_mapped
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.weight import GROUP_SIZES
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.plan.layout import (
    BY_INPUTS,
    BY_OUTPUTS,
    BY_VOCABULARY,
    Architecture,
    Layout,
    problem,
    vocabulary_part,
)


def check_division(config: XverseConfig, count: int) -> None:
    """Raises UserError that names what ``count`` processes do not divide."""
    config.without_experts("--tensor-parallel")
    if fault := problem(Architecture.of(config), Layout(tensor=count)):
        raise UserError(f"--tensor-parallel {count}: {fault}")


def share_of(config: XverseConfig, count: int) -> XverseConfig:
    """The shape of one process's part as the key-value cache sees it."""
    return dataclasses.replace(
        config,
        head_dim=config.head_dim,
        num_attention_heads=config.num_attention_heads // count,
        num_key_value_heads=config.num_key_value_heads // count,
    )


class Division:
    """Divides a model over ``ranks``. ``placed`` is called for each module as soon as it has its weight, so
    that a process never holds the whole model; ``finish`` divides the others."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._done: set[str] = set()

    def placed(self, model: nn.Module, name: str) -> None:
        """Divide the module ``name``, unless it still waits for its bias."""
        if getattr(model.get_submodule(name), "bias", None) is None:
            self._divide(model, name)

    def _divide(self, model: nn.Module, name: str) -> None:
        """Replace the module ``name`` by this process's part."""
        rank, count = self._ranks.rank, self._ranks.count
        layer = model.get_submodule(name)
        new: nn.Module | None = None
        if name.endswith(BY_OUTPUTS):
            new = outputs_part(layer, _equal(_outputs(layer, name), rank, count))
        elif name.endswith(BY_INPUTS):
            outputs = inputs_part(layer, _equal(_inputs(layer), rank, count))
            new = Summed(outputs, getattr(layer, "bias", None), self._ranks)
        elif name in BY_VOCABULARY:
            rows = vocabulary_part(_outputs(layer, name), rank, count)
            if name == "lm_head":
                new = Head(outputs_part(layer, rows), _outputs(layer, name), self._ranks)
            else:
                new = Embedding(embedding_part(layer, rows), rows, self._ranks)
        if new is not None:
            self._done.add(name)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to(self._ranks.device))

    def finish(self, model: XverseForCausalLM) -> XverseForCausalLM:
        """Divide what has not been divided, and move the rest to the device."""
        names = [name for name, _ in model.named_modules()]
        for name in names:
            if not any(name == done or name.startswith(f"{done}.") for done in self._done):
                self._divide(model, name)
        head, embedding = model.lm_head, model.model.embed_tokens
        assert isinstance(head, Head)
        assert isinstance(embedding, Embedding)
        if model.config.tie_word_embeddings and isinstance(head.part, nn.Linear):
            assert isinstance(embedding.part, nn.Embedding)
            head.part.weight = embedding.part.weight
        model.ranks = self._ranks  # type: ignore[assignment]  # read by ranks_of
        return model.to(self._ranks.device)


class Summed(nn.Module):
    """A linear of which ``part`` has this process's inputs. With an activation order, which takes columns
    from everywhere, the inputs are exchanged first."""

    def __init__(self, part: nn.Module, bias: nn.Parameter | None, ranks: Ranks) -> None:
        super().__init__()
        self.part, self.bias = part, bias
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """[..., K / n] → [..., N]."""
        if getattr(self.part, "order", None) is not None:
            x = self._ranks.joined(x)
        y = self._ranks.total(self.part(x))
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """An embedding of which ``part`` has the tokens ``rows``."""

    def __init__(self, part: nn.Module, rows: range, ranks: Ranks) -> None:
        super().__init__()
        self.part, self._rows, self._ranks = part, rows, ranks

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] → [..., D]."""
        own = (tokens >= self._rows.start) & (tokens < self._rows.stop)
        x = self.part((tokens - self._rows.start).clamp(0, max(len(self._rows) - 1, 0)))
        return self._ranks.total(torch.where(own[..., None], x, 0))


class Head(nn.Module):
    """The output head of which ``part`` has some of the ``vocab_size`` tokens."""

    def __init__(self, part: nn.Module, vocab_size: int, ranks: Ranks) -> None:
        super().__init__()
        self.part, self._vocab_size, self._ranks = part, vocab_size, ranks
        self._most = len(vocabulary_part(vocab_size, 0, ranks.count))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] → logits [..., V] in every process."""
        logits = self.part(hidden)
        logits = nn.functional.pad(logits, (0, self._most - logits.shape[-1]))
        return self._ranks.joined(logits)[..., : self._vocab_size]


def outputs_part(layer: nn.Module, rows: range) -> nn.Module:
    """A linear with the outputs ``rows`` of ``layer``."""
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias = nn.Parameter(bias.detach()[rows.start : rows.stop].clone(), requires_grad=False)
    if isinstance(layer, QuantLinear):
        part = QuantLinear.from_weight(layer.to_weight().outputs(rows), bias)
        part.order = layer.order
        return part
    assert isinstance(layer, nn.Linear)
    return _linear(layer.weight.detach()[rows.start : rows.stop], bias)


def inputs_part(layer: nn.Module, columns: range) -> nn.Module:
    """A linear with the inputs ``columns`` of ``layer``, and without its bias."""
    if not isinstance(layer, QuantLinear):
        assert isinstance(layer, nn.Linear)
        return _linear(layer.weight.detach()[:, columns.start : columns.stop], None)
    weight = layer.to_weight()
    group = math.gcd(weight.group_size, len(columns))
    if group % GROUP_SIZES[0]:
        raise UserError(
            f"--tensor-parallel: {len(columns)} of {layer.in_features} inputs of a quantised layer do not "
            f"divide into groups of {GROUP_SIZES[0]} weights; use fewer processes or unquantised weights"
        )
    part = QuantLinear.from_weight(weight.regrouped(group).inputs(columns))
    if layer.order is not None:
        part.order = layer.order[columns.start : columns.stop].clone()
    return part


def embedding_part(layer: nn.Module, rows: range) -> nn.Module:
    """An embedding with the tokens ``rows`` of ``layer``."""
    if isinstance(layer, QuantEmbedding):
        own = slice(rows.start, rows.stop)
        return QuantEmbedding(_own(layer.rows[own]), _own(layer.scales[own]), layer.bits, layer.dtype)
    assert isinstance(layer, nn.Embedding)
    part = nn.Embedding.from_pretrained(_own(layer.weight.detach()[rows.start : rows.stop]))
    keep_in_file(part)
    return part


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    part.weight = nn.Parameter(_own(weight), requires_grad=False)
    part.bias = bias  # type: ignore[assignment]
    return part


def _own(part: Tensor) -> Tensor:
    """``part`` without the rest of its tensor: rows of a mapped file, of which only pages that are read are
    resident, or a copy."""
    end = part.data_ptr() + part.nbytes
    if part.device.type == "cpu" and part.is_contiguous() and file_mapped(part.data_ptr(), end):
        return part
    return part.clone(memory_format=torch.contiguous_format)


def _equal(size: int, rank: int, count: int) -> range:
    return range(size // count * rank, size // count * (rank + 1))


def _outputs(layer: nn.Module, name: str) -> int:
    if isinstance(layer, QuantLinear):
        return layer.out_features
    if isinstance(layer, QuantEmbedding):
        return layer.rows.shape[0]
    if not isinstance(layer, (nn.Linear, nn.Embedding)):
        raise UserError(f"--tensor-parallel: {name} is a {type(layer).__name__}, which cannot be divided")
    return layer.weight.shape[0]


def _inputs(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, QuantLinear) else layer.weight.shape[1]  # type: ignore
