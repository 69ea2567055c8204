"""Quantises a model layer by layer, with one layer in memory, and measures the parity in the same pass.

The source's tensors come from a function, an iterator gives the quantised ones. Only hidden states are kept
between layers: those of the source and those of the quantised model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.weight import QuantizedWeight, add_centres
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.model.transformer import DecoderLayer
from xverse.quant.equalize import equalize_layer, split_norm
from xverse.quant.gptq import Hessian, HessianFactor, gptq
from xverse.quant.head import round_head, row_centres
from xverse.quant.layerwise import (
    OUTPUT,
    QKV,
    downs,
    forward,
    gates_and_ups,
    input_rms,
    make_layer,
    make_norm,
    replace_linears,
)
from xverse.quant.methods import rtn, rtn_row
from xverse.quant.mixing import measure
from xverse.quant.parity import LogitFigures, ParityReport, compare, next_tokens, relative_error, rows_at_once
from xverse.quant.rotate import rotated, rotated_layer
from xverse.quant.settings import Format, QuantSettings, fitting_group, input_sizes
from xverse.quant.text import resized
from xverse.quant.tuning import refine, whole_model

Quantized = Tensor | QuantizedWeight
Inputs = Tensor | HessianFactor | None
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
WHOLE_PARAMETERS = 10**9  # at most: what needs the whole source in memory, gradients or a refinement
_GRADIENT_TOKENS, _GRADIENT_LENGTH = 4096, 128
_RANDOM_ROWS, _RANDOM_LENGTH = 2, 128  # random tokens by which rtn measures the channels
_ROWS_AT_ONCE = 8192  # of the embedding or the head, converted to float32 at a time


def random_tokens(vocab_size: int) -> Tensor:
    """Tokens int64 [2, 128] drawn uniformly from the vocabulary with a fixed seed. ``rtn`` needs no text: the
    outlier channels of the residual stream hardly depend on the tokens."""
    shape = (_RANDOM_ROWS, _RANDOM_LENGTH)
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


class Quantizer:
    """Quantises one model: iterate over ``tensors()`` to the end, then read ``report``.

    A tied head becomes a tensor of its own: head and embedding are quantised differently.

    ``read(prefix)`` returns the source's tensors whose name starts with ``prefix`` (``model.embed_tokens.``,
    ``model.layers.3.``, ``model.norm.``, ``lm_head.``), by their full names, of any float dtype. They are not
    changed and not kept after their layer; everything is computed on their device. ``gptq`` and ``rtn``
    measure inputs on ``calibration`` int64 [n, T]; ``rtn`` uses random tokens without. Parity is measured on
    ``sample`` int64 [n, T]. Raises UserError for layers whose inputs no group size divides, for ``gptq``
    without calibration and for weights that are not finite.
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
            for size in input_sizes(config):
                fitting_group(size, settings.group_size)
        if settings.method == "gptq" and (calibration is None or not calibration.numel()):
            raise UserError("gptq: needs calibration text")
        self.config, self.read, self.settings = config, read, settings
        self.calibration = None if settings.method == "rtn-row" else calibration
        if settings.method == "rtn" and calibration is None:
            self.calibration = random_tokens(config.vocab_size)
        small = config.num_parameters() <= WHOLE_PARAMETERS
        gptq = settings.method == "gptq"
        self.refines, self.uses_whole = settings.refine and small, gptq and small
        self.rotates = gptq and settings.balance and not config.num_experts  # routers would be rounded
        self._gradients: dict[str, Tensor] = {}  # of log p by the outputs of linears: mean outer products
        self.sample = sample if sample is not None and sample.numel() else None
        self.progress = progress or (lambda _: None)
        self._report: ParityReport | None = None
        self._bytes_source = self._bytes_quantized = 0
        self._reading: Mapping[str, Tensor] = {}

    @property
    def report(self) -> ParityReport:
        """The figures of the run, available after the last tensor."""
        assert self._report is not None, "tensors() has not been exhausted yet"
        return self._report

    def tensors(self) -> Iterator[tuple[str, Quantized]]:
        """Every tensor of the quantised model by name, in the model's order; the norm weights differ from the
        source's."""
        if self.uses_whole:
            self.progress("gradients")
            self._gradients = self._output_gradients()
        if not self.refines:
            yield from self._layer_by_layer()
            return
        tensors: Mapping[str, Quantized] = dict(self._layer_by_layer())
        source = self.whole_source()
        assert self.calibration is not None
        rows = self.calibration.to(source.lm_head.weight.device)
        tensors = refine(tensors, source, rows, self.progress)
        if self.sample is not None:
            model = whole_model(self.config, tensors)
            figures = compare(source, model, self.sample.to(rows.device)).report()
            self._report = dataclasses.replace(
                figures,
                layer_errors=self.report.layer_errors,
                bytes_source=self.report.bytes_source,
                bytes_quantized=self.report.bytes_quantized,
            )
        yield from tensors.items()

    def _output_gradients(self) -> dict[str, Tensor]:
        assert self.calibration is not None
        source = self.whole_source()
        rows = resized(self.calibration, _GRADIENT_TOKENS, _GRADIENT_LENGTH).to(source.lm_head.weight.device)
        return {name: found.gradients for name, found in measure(source, rows, outer=True).items()}

    def whole_source(self) -> XverseForCausalLM:
        """The whole source in float32, in the basis that is rounded."""
        prefixes = [EMBEDDING, *(f"model.layers.{i}." for i in range(self.config.num_hidden_layers)), NORM]
        if not self.config.tie_word_embeddings:
            prefixes.append(HEAD)
        tensors: dict[str, Tensor] = {}
        for prefix in prefixes:
            self._reading = self.read(prefix.removesuffix("weight"))
            self._check_finite(prefix, *self._reading.values())
            tensors |= self._rotated_layer(self._reading)
        self._reading = {}
        head, norm = self._rotated_head(tensors.get(HEAD, tensors[EMBEDDING]), tensors[NORM])
        tensors |= {HEAD: head, NORM: norm, EMBEDDING: self._rotated(tensors[EMBEDDING])}
        return whole_model(self.config, tensors)

    def _rotated(self, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """[N, D] in the basis of the run's residual stream."""
        if not self.rotates:
            return x
        return torch.cat([rotated(part, norm) for part in x.split(_ROWS_AT_ONCE)])

    def _rotated_layer(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return rotated_layer(tensors) if self.rotates else tensors

    def _rotated_head(self, head: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        return (self._rotated(head, norm), torch.ones_like(norm)) if self.rotates else (head, norm)

    @torch.no_grad()
    def _layer_by_layer(self) -> Iterator[tuple[str, Quantized]]:
        # Hidden states [n, T, D] of the source and the quantised model on the sample, and on the calibration.
        source, quantized, calibration = None, None, None
        self.progress("embedding")
        embedding = self._read(EMBEDDING)[EMBEDDING]
        stored = self._embedding(self._rotated(embedding).to(embedding.dtype))
        if self.sample is not None:
            source = self._rotated(_look_up(embedding, self.sample).flatten(0, 1))  # [n·T, D]
            source = source.view(*self.sample.shape, -1)
            quantized = _look_up(stored, self.sample)
        if self.calibration is not None:
            calibration = _look_up(stored, self.calibration)
        del embedding
        yield EMBEDDING, stored
        del stored
        errors = []
        for number in range(self.config.num_hidden_layers):
            self.progress(f"layer {number + 1} of {self.config.num_hidden_layers}")
            prefix = f"model.layers.{number}."
            layer = make_layer(self.config, number, self._rotated_layer(self._read(prefix)))
            if source is not None:
                source = forward(layer, self.config, source)
            tensors = self._quantize_layer(layer, prefix, calibration)
            if source is not None and quantized is not None:
                quantized = forward(layer, self.config, quantized)
                errors.append(relative_error(source, quantized))
            if calibration is not None and self.settings.method == "rtn":
                calibration = forward(layer, self.config, calibration)
            del layer
            yield from tensors.items()
            del tensors
        self.progress("head")
        norm = self._read(NORM)[NORM]
        source_of_head = EMBEDDING if self.config.tie_word_embeddings else HEAD
        head, norm = self._rotated_head(self._read(source_of_head)[source_of_head], norm)
        new_norm, new_head = self._head(norm, head, calibration)
        figures = LogitFigures()
        if source is not None and quantized is not None:
            self._measure(figures, (source, norm, head), (quantized, new_norm, new_head))
        del norm, head
        self._reading = {}
        yield NORM, new_norm
        yield HEAD, new_head
        self._report = figures.report(tuple(errors), self._bytes_source, self._bytes_quantized)

    def _read(self, prefix: str) -> Mapping[str, Tensor]:
        self._reading = {}  # frees the previous tensors first
        self._reading = self.read(prefix.removesuffix("weight"))
        self._bytes_source += sum(tensor.numel() * tensor.itemsize for tensor in self._reading.values())
        return self._reading

    def _count(self, name: str, stored: Quantized) -> None:
        """Adds a tensor to the size of the model; raises UserError if it is not finite."""
        if isinstance(stored, Tensor):
            self._bytes_quantized += stored.numel() * stored.itemsize
            return
        self._check_finite(name, stored.scales)
        self._bytes_quantized += stored.stored_bytes

    def _check_finite(self, name: str, *results: Tensor) -> None:
        """Raises UserError if ``results`` are not finite; names the source's tensor that is not."""
        if not all(tensor.isfinite().all() for tensor in results):
            sources = (source for source, tensor in self._reading.items() if not tensor.isfinite().all())
            raise UserError(f"{next(sources, name)}: holds NaN or infinity; the model cannot be quantised")

    def _round(
        self,
        weight: Tensor,
        form: Format,
        inputs: Inputs = None,
        gradients: Tensor | None = None,
        linear: bool = True,
    ) -> QuantizedWeight:
        """``weight`` [N, K] by the method of the run; ``inputs``: mean squares [K] of the inputs or their
        Hessian; ``gradients`` as for ``gptq``. Only a ``linear`` can have a table."""
        table = self.settings.table_of(form[0]) if linear else None
        if self.settings.method == "rtn-row":
            return rtn_row(weight, form[0])
        if isinstance(inputs, HessianFactor):
            return gptq(weight, *form, inputs, table, gradients)
        return rtn(weight, *form, inputs, table)

    def _embedding(self, weight: Tensor) -> Quantized:
        bits = self.settings.resolved_embedding_bits
        stored: Quantized = weight
        if bits != 16:
            form = self.settings.format_of(_module(EMBEDDING), weight.shape[1], bits)
            parts = weight.split(_ROWS_AT_ONCE)
            stored = _concatenate([self._round(part.float(), form, linear=False) for part in parts])
        self._count(EMBEDDING, stored)
        return stored

    def _quantize_layer(
        self, layer: DecoderLayer, prefix: str, calibration: Tensor | None
    ) -> dict[str, Quantized]:
        """Replaces the linears of ``layer`` and returns its tensors; with gptq ``calibration`` [n, T, D]
        becomes the layer's output, in place."""
        weights: dict[str, QuantizedWeight] = {}

        def replace(names: tuple[str, ...], inputs: Inputs) -> None:
            for name in names:
                parent, _, child = name.rpartition(".")
                owner = layer.get_submodule(parent)
                plain = owner.get_parameter(f"{child}.weight")
                form = self.settings.format_of(f"{prefix}{name}", plain.shape[1])
                gradients = self._gradients.pop(f"{prefix}{name}", None)
                weight = self._round(plain, form, inputs, gradients)
                self._count(f"{prefix}{name}.weight", weight)
                bias = getattr(owner.get_submodule(child), "bias", None)
                setattr(owner, child, QuantLinear.from_weight(weight, bias))
                weights[name] = weight

        def replace_by_gptq(names: tuple[str, ...], hessian: Hessian) -> None:
            replace(names, HessianFactor(hessian.mean) if hessian.tokens else None)

        config = self.config
        linears = (*QKV, *OUTPUT, *gates_and_ups(config), *downs(config))
        if calibration is None:
            replace(linears, None)
        else:
            rms = input_rms(layer, self.config, calibration)
            self._check_finite(prefix, rms.qkv, rms.o, rms.gate_up, *rms.downs.values())
            if self.settings.balance:
                rms, divided = equalize_layer(layer, rms)
                values = self._gradients.get(f"{prefix}{QKV[2]}")
                if values is not None:
                    values.mul_(divided).mul_(divided[:, None])
            if self.settings.method == "gptq":
                replace_linears(layer, self.config, calibration, replace_by_gptq)
            else:
                replace(QKV, _importance(rms.qkv))
                replace(OUTPUT, _importance(rms.o))
                replace(gates_and_ups(config), _importance(rms.gate_up))
                for name in downs(config):  # no token of the calibration may have activated an expert
                    replace((name,), _importance(rms.downs[name]) if name in rms.downs else None)
        tensors: dict[str, Quantized] = {f"{prefix}{name}.weight": weights[name] for name in linears}
        for name, parameter in layer.named_parameters():  # norms, biases and the router
            stored = self._reading[f"{prefix}{name}"].dtype
            tensors[f"{prefix}{name}"] = parameter.detach().to(stored)
            self._count(name, tensors[f"{prefix}{name}"])
        return tensors

    def _head(self, norm: Tensor, head: Tensor, calibration: Tensor | None) -> tuple[Tensor, Quantized]:
        """The final norm's weight [D] and the head [V, D], quantised."""
        bits = self.settings.resolved_head_bits
        stored: Quantized = head.to(next(iter(self._reading.values())).dtype)
        if bits != 16:
            form = self.settings.format_of(_module(HEAD), head.shape[1], bits)
            inputs: Inputs = None
            factors = torch.ones(head.shape[1], device=head.device)
            apart: tuple[Tensor, Tensor] | None = None  # centres of the rows, each row's nearest
            parts = [slice(at, at + _ROWS_AT_ONCE) for at in range(0, len(head), _ROWS_AT_ONCE)]

            def rest(rows: slice = slice(None)) -> Tensor:
                part = head[rows].float() * factors
                return part if apart is None else add_centres(part, -apart[0], apart[1][rows])

            if calibration is not None:
                x = make_norm(norm, self.config)(calibration.flatten(0, 1))  # [n·T, D]
                hessian = Hessian(head.shape[1], head.device)
                hessian.add(x)
                self._check_finite(NORM, hessian.mean)
                rms = hessian.mean.diagonal().sqrt()
                if self.settings.method == "gptq" and self.settings.table_of(form[0]) is not None:
                    apart = row_centres(head, x)
                if self.settings.balance:
                    weights = [head] if apart is None else [rest(rows) for rows in parts]
                    norm, factors, rms = split_norm(norm, weights, rms)
                inputs = _importance(rms)
                if self.settings.method == "gptq":
                    inputs = HessianFactor(hessian.mean / factors[:, None] / factors)
            if apart is not None:
                apart = (apart[0] * factors).bfloat16(), apart[1].to(torch.uint8)
            if calibration is not None and self.uses_whole:
                rounded = functools.partial(self._round, form=form)
                weight = round_head(head * factors, rest(), x / factors, rounded)
            else:
                weight = _concatenate([self._round(rest(rows), form, inputs) for rows in parts])
            centres, nearest = apart or (None, None)
            stored = dataclasses.replace(weight, centres=centres, nearest=nearest)
        self._count(NORM, norm)
        self._count(HEAD, stored)
        return norm, stored

    def _measure(
        self,
        figures: LogitFigures,
        source: tuple[Tensor, Tensor, Tensor],
        quantized: tuple[Tensor, Tensor, Quantized],
    ) -> None:
        """Adds the logits of both models to ``figures``; from hidden states [n, T, D], norm and head."""
        assert self.sample is not None
        targets = next_tokens(self.sample).flatten().to(source[0].device)
        hidden = [
            make_norm(weight, self.config)(x).flatten(0, 1) for x, weight, _ in (source, quantized)
        ]  # [n·T, D] each
        heads = [_linear(source[2]), _linear(quantized[2])]
        size = rows_at_once(self.config.vocab_size)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            logits = [head(x[part]) for head, x in zip(heads, hidden, strict=True)]
            figures.add(logits[0], logits[1], targets[part])


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _linear(weight: Quantized) -> Callable[[Tensor], Tensor]:
    """x [N, D] → [N, V] with a weight [V, D]."""
    if isinstance(weight, QuantizedWeight):
        return QuantLinear.from_weight(weight)

    def apply(x: Tensor) -> Tensor:
        return torch.cat([x @ part.float().T for part in weight.split(_ROWS_AT_ONCE)], dim=1)

    return apply


def _look_up(weight: Quantized, tokens: Tensor) -> Tensor:
    """``tokens`` int64 [n, T] → embeddings float32 [n, T, D]."""
    if isinstance(weight, QuantizedWeight):
        return QuantEmbedding.from_weight(weight, torch.float32)(tokens.to(weight.q.device))
    return torch.nn.functional.embedding(tokens.to(weight.device), weight).float()


def _concatenate(parts: list[QuantizedWeight]) -> QuantizedWeight:
    q, scales = torch.cat([part.q for part in parts]), torch.cat([part.scales for part in parts])
    return QuantizedWeight(q, scales, parts[0].bits, parts[0].table)


def _importance(rms: Tensor) -> Tensor:
    """Mean squares [K] from root mean squares [K] of inputs, at least a thousandth of their average."""
    squares = rms.square()
    return squares.clamp(min=max(1e-3 * squares.mean().item(), 1e-30))
