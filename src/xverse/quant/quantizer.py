"""Quantise a model layer by layer: one layer of it in memory, and the parity figures from the same pass.

The source's tensors come from a function, the quantised ones go out of an iterator; hidden states of both
models, each fed by its own layers before, are all that is kept between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.weight import QuantizedWeight, check_bits, check_group_size
from xverse.model import XverseConfig
from xverse.model.transformer import DecoderLayer
from xverse.quant.equalize import equalize_layer, split_norm
from xverse.quant.gptq import Hessian, HessianFactor, gptq
from xverse.quant.layerwise import LINEARS, forward, input_sizes, learn, make_layer, make_norm, parts
from xverse.quant.methods import rtn, rtn_row
from xverse.quant.parity import LogitFigures, ParityReport, next_tokens, relative_error, rows_at_once

Method = Literal["rtn", "rtn-row", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "rtn-row", "gptq")
Quantized = Tensor | QuantizedWeight
Inputs = Tensor | HessianFactor | None
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_RANDOM_ROWS, _RANDOM_LENGTH = 2, 128  # tokens drawn at random that show rtn the channels' sizes
_ROWS_AT_ONCE = 8192  # of the embedding or the head, widened to float32 at a time


@dataclass(frozen=True, kw_only=True)
class QuantSettings:
    """How to quantise. ``head_bits`` and ``embedding_bits``: 4, 8, or 16 for "left as it is".

    None takes the rule: upstream's ``rtn-row`` leaves both; the others take 8 bits for both.
    Raises UserError for bits, a method or a group size that is not offered.
    """

    bits: int
    method: Method = "rtn"
    group_size: int = 128
    head_bits: int | None = None
    embedding_bits: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.method not in METHODS:
            raise UserError(f"method: '{self.method}' is not one of {', '.join(METHODS)}")
        check_group_size(self.group_size)
        for name in ("head_bits", "embedding_bits"):
            if getattr(self, name) not in (None, 4, 8, 16):
                raise UserError(f"{name}: {getattr(self, name)} is not supported; 4, 8 or 16")

    @property
    def resolved_head_bits(self) -> int:
        return self.head_bits or (16 if self.method == "rtn-row" else 8)

    @property
    def resolved_embedding_bits(self) -> int:
        return self.embedding_bits or (16 if self.method == "rtn-row" else 8)


def random_tokens(vocab_size: int) -> Tensor:
    """Tokens int64 [2, 128] drawn evenly from the vocabulary, always the same. ``rtn`` needs no text: which
    channels are large shows on any tokens (the residual stream's outlier channels hardly depend on them)."""
    shape = (_RANDOM_ROWS, _RANDOM_LENGTH)
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


class Quantizer:
    """One run over a model: go through ``tensors()`` to its end, then read ``report``.

    ``read(prefix)`` gives the source's tensors whose name starts with ``prefix`` (``model.embed_tokens.``,
    ``model.layers.3.``, ``model.norm.``, ``lm_head.``) on the CPU, under their full names, in any float type.
    They are not changed and not kept beyond their layer. ``calibration`` int64 [n, T] is what ``gptq``
    learns from; on ``sample`` int64 [n, T] the parity is measured. Raises UserError for a group size that
    does not divide a layer's inputs, for ``gptq`` without calibration and for weights that are not finite.
    """

    def __init__(
        self,
        config: XverseConfig,
        read: Callable[[str], Mapping[str, Tensor]],
        settings: QuantSettings,
        *,
        calibration: Tensor | None = None,
        sample: Tensor | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if settings.method != "rtn-row":
            check_group_size(settings.group_size, config.hidden_size, config.intermediate_size)
        if settings.method == "gptq" and (calibration is None or not calibration.numel()):
            raise UserError("gptq: needs calibration text")
        self.config, self.read, self.settings = config, read, settings
        self.calibration = calibration if settings.method == "gptq" else None
        if settings.method == "rtn":
            self.calibration = random_tokens(config.vocab_size)
        self.sample = sample if sample is not None and sample.numel() else None
        self.progress = progress or (lambda _: None)
        self._report: ParityReport | None = None
        self._bytes_source = self._bytes_quantized = 0
        self._reading: Mapping[str, Tensor] = {}

    @property
    def report(self) -> ParityReport:
        """The figures of the run; only after the last tensor."""
        assert self._report is not None, "the tensors have not all been taken yet"
        return self._report

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Quantized]]:
        """Every tensor of the quantised model in the model's order; norm weights come changed."""
        source, quantized, learning = None, None, None
        self.progress("embedding")
        embedding = self._read(EMBEDDING)[EMBEDDING]
        stored = self._embedding(embedding)
        if self.sample is not None:
            source = embedding[self.sample].float()  # [n, T, D]
            quantized = _look_up(stored, self.sample)
        if self.calibration is not None:
            learning = _look_up(stored, self.calibration)
        del embedding
        yield EMBEDDING, stored
        del stored
        errors = []
        for number in range(self.config.num_hidden_layers):
            self.progress(f"layer {number + 1} of {self.config.num_hidden_layers}")
            prefix = f"model.layers.{number}."
            layer = make_layer(self.config, number, self._read(prefix))
            if source is not None:
                source = forward(layer, self.config, source)
            made = self._quantize_layer(layer, prefix, learning)
            if source is not None and quantized is not None:
                quantized = forward(layer, self.config, quantized)
                errors.append(relative_error(source, quantized))
            if learning is not None and self.settings.method == "rtn":
                learning = forward(layer, self.config, learning)
            del layer
            yield from made.items()
            del made
        self.progress("head")
        norm, head = self._read(NORM)[NORM], self._read(HEAD)[HEAD]
        new_norm, new_head = self._head(norm, head, learning)
        figures = LogitFigures()
        if source is not None and quantized is not None:
            self._measure(figures, (source, norm, head), (quantized, new_norm, new_head))
        del norm, head
        self._reading = {}
        yield NORM, new_norm
        yield HEAD, new_head
        self._report = figures.report(tuple(errors), self._bytes_source, self._bytes_quantized)

    def _read(self, prefix: str) -> Mapping[str, Tensor]:
        self._reading = {}  # let go of the last ones first
        self._reading = self.read(prefix.removesuffix("weight"))
        self._bytes_source += sum(tensor.numel() * tensor.itemsize for tensor in self._reading.values())
        return self._reading

    def _count(self, name: str, stored: Quantized) -> None:
        """Adds a tensor to the size, and refuses what cannot be quantised."""
        if isinstance(stored, Tensor):
            self._bytes_quantized += stored.numel() * stored.itemsize
            return
        self._check_finite(name, stored.scales)
        self._bytes_quantized += stored.q.numel() * stored.bits // 8 + 2 * stored.scales.numel()

    def _check_finite(self, name: str, *made: Tensor) -> None:
        """Raises UserError that names the source's tensor that is not finite, where ``made`` shows one."""
        if not all(tensor.isfinite().all() for tensor in made):
            broken = (each for each, tensor in self._reading.items() if not tensor.isfinite().all())
            raise UserError(f"{next(broken, name)}: holds NaN or infinity; the model cannot be quantised")

    def _round(self, weight: Tensor, bits: int, inputs: Inputs = None) -> QuantizedWeight:
        """``inputs``: what is known of a linear's inputs, mean squares [K] or a plan of gptq's."""
        if self.settings.method == "rtn-row":
            return rtn_row(weight, bits)
        if isinstance(inputs, HessianFactor):
            return gptq(weight, bits, self.settings.group_size, inputs)
        return rtn(weight, bits, self.settings.group_size, inputs)

    def _embedding(self, weight: Tensor) -> Quantized:
        bits = self.settings.resolved_embedding_bits
        stored: Quantized = weight
        if bits != 16:
            stored = _joined([self._round(part.float(), bits) for part in weight.split(_ROWS_AT_ONCE)])
        self._count(EMBEDDING, stored)
        return stored

    def _quantize_layer(
        self, layer: DecoderLayer, prefix: str, learning: Tensor | None
    ) -> dict[str, Quantized]:
        """Replaces the linears of ``layer`` and returns its tensors; gptq moves ``learning`` [n, T, D] on."""
        found: dict[str, QuantizedWeight] = {}

        def replace(names: tuple[str, ...], inputs: Inputs) -> None:
            for name in names:
                parent, child = name.split(".")
                owner = layer.get_submodule(parent)
                found[name] = self._round(owner.get_parameter(f"{child}.weight"), self.settings.bits, inputs)
                self._count(f"{prefix}{name}.weight", found[name])
                setattr(owner, child, QuantLinear.from_weight(found[name]))

        if learning is None:
            replace(LINEARS, None)
        else:
            sizes = input_sizes(layer, self.config, learning)
            self._check_finite(prefix, sizes.qkv, sizes.o, sizes.gate_up, sizes.down)
            sizes = equalize_layer(layer, sizes)
            if self.settings.method == "gptq":
                learn(
                    layer,
                    self.config,
                    learning,
                    lambda names, hessian: replace(names, HessianFactor(hessian.mean)),
                )
            else:
                replace(LINEARS[:3], _importance(sizes.qkv))
                replace(LINEARS[3:4], _importance(sizes.o))
                replace(LINEARS[4:6], _importance(sizes.gate_up))
                replace(LINEARS[6:], _importance(sizes.down))
        made: dict[str, Quantized] = {f"{prefix}{name}.weight": found[name] for name in LINEARS}
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}{name}.weight"] = layer.get_parameter(f"{name}.weight").detach()
            self._count(name, made[f"{prefix}{name}.weight"])
        return made

    def _head(self, norm: Tensor, head: Tensor, learning: Tensor | None) -> tuple[Tensor, Quantized]:
        bits = self.settings.resolved_head_bits
        stored: Quantized = head
        if bits != 16:
            inputs: Inputs = None
            factors = torch.ones(())
            if learning is not None:
                hessian = self._head_inputs(norm, learning)
                self._check_finite(NORM, hessian)
                norm, factors, sizes = split_norm(norm, [head], hessian.diagonal().sqrt())
                inputs = _importance(sizes)
                if self.settings.method == "gptq":
                    inputs = HessianFactor(hessian / factors[:, None] / factors)
            made = [self._round(x.float() * factors, bits, inputs) for x in head.split(_ROWS_AT_ONCE)]
            stored = _joined(made)
        self._count(NORM, norm)
        self._count(HEAD, stored)
        return norm, stored

    def _head_inputs(self, norm: Tensor, learning: Tensor) -> Tensor:
        """The Hessian [D, D] of the head's inputs."""
        hessian = Hessian(self.config.hidden_size)
        for rows in parts(learning):
            hessian.add(make_norm(norm, self.config.rms_norm_eps)(rows))
        return hessian.mean

    def _measure(
        self,
        figures: LogitFigures,
        source: tuple[Tensor, Tensor, Tensor],
        quantized: tuple[Tensor, Tensor, Quantized],
    ) -> None:
        """Logits of both from hidden states, norm weight and head."""
        assert self.sample is not None
        eps = self.config.rms_norm_eps
        targets = next_tokens(self.sample).flatten()
        hidden = [make_norm(weight, eps)(x).flatten(0, 1) for x, weight, _ in (source, quantized)]  # [n·T, D]
        heads = [_linear(source[2]), _linear(quantized[2])]
        size = rows_at_once(self.config.vocab_size)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logits = [head(x[part]) for head, x in zip(heads, hidden, strict=True)]
            figures.add(logits[0], logits[1], targets[part])


def _linear(weight: Quantized) -> Callable[[Tensor], Tensor]:
    if isinstance(weight, QuantizedWeight):
        return QuantLinear.from_weight(weight)

    def apply(x: Tensor) -> Tensor:
        return torch.cat([x @ part.float().T for part in weight.split(_ROWS_AT_ONCE)], dim=1)

    return apply


def _look_up(weight: Quantized, tokens: Tensor) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        return QuantEmbedding.from_weight(weight, torch.float32)(tokens)
    return weight[tokens].float()


def _joined(made: list[QuantizedWeight]) -> QuantizedWeight:
    q, scales = torch.cat([part.q for part in made]), torch.cat([part.scales for part in made])
    return QuantizedWeight(q, scales, made[0].bits)


def _importance(sizes: Tensor) -> Tensor:
    """Mean squares [K] of inputs, those that were hardly seen counting a thousandth of the average."""
    squares = sizes.square()
    return squares.clamp(min=max(1e-3 * squares.mean().item(), 1e-30))
