"""Scales and norms refined from end to end: gradient descent on the KL divergence, with the integers fixed.

Rounding layer by layer minimises each layer's own error. What the errors of all layers do to the logits is
only visible at the end: here the quantised model is compared with its source on the calibration text, and
the scales of the groups and the weights of the norms follow the gradient. The stored format does not change,
and so neither do size and speed. Both models are in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xverse.kernels.linear import QuantLinear
from xverse.kernels.weight import QuantizedWeight
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM
from xverse.quant.parity import rows_at_once

STEPS = 96
_TOKENS_AT_ONCE = 2048  # of a step
_RATE = 1e-3  # Adam's, relative to the size of what it changes; falls linearly to 0


def _product(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """``x`` [..., K] times the transpose of ``q`` int8 [N, G, group] · ``scales`` [N, G]."""
    return x @ (q * scales[..., None]).flatten(1).T


class _Linear(nn.Module):
    """A quantised linear whose scales can be trained, relative to their size."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.scales = weight, weight.scales.float()
        self.q = weight.values.view(*weight.scales.shape, -1)
        self.bias = bias
        self.change = nn.Parameter(torch.zeros_like(self.scales))

    def forward(self, x: Tensor) -> Tensor:
        # The weight is computed again in the backward pass, so that only integers are kept.
        scales = self.scales * (1 + self.change)
        y: Tensor = checkpoint(_product, x, self.q, scales, use_reentrant=False, preserve_rng_state=False)
        if self.weight.centres is not None and self.weight.nearest is not None:
            y = y + (x @ self.weight.centres.float().T)[..., self.weight.nearest.long()]
        return y if self.bias is None else y + self.bias

    def result(self) -> QuantizedWeight:
        scales = (self.scales * (1 + self.change.detach())).bfloat16()
        return dataclasses.replace(self.weight, scales=scales)


def refine(
    tensors: Mapping[str, Tensor | QuantizedWeight],
    source: XverseForCausalLM,
    rows: Tensor,
    report: Callable[[str], None],
    steps: int | None = None,
) -> dict[str, Tensor | QuantizedWeight]:
    """``tensors`` of a quantised model with refined scales and norms; the others are the same.

    ``source`` in float32, ``rows`` int64 [n, T] of text on its device; ``report`` is called before each of
    ``steps`` (default: STEPS).
    """
    steps = steps or STEPS
    model = whole_model(source.config, tensors, _Linear)
    linears = {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, _Linear)
    }
    norms = {
        name: parameter.requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name in tensors and name.endswith("norm.weight")
    }
    groups = [{"params": [linear.change for linear in linears.values()], "lr": _RATE}]
    groups += [{"params": [norm], "lr": _RATE * norm.detach().abs().mean().item()} for norm in norms.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    at_once = max(1, _TOKENS_AT_ONCE // rows.shape[1])
    generator = torch.Generator().manual_seed(0)
    waiting: list[int] = []
    for step in range(steps):
        report(f"refining scales, step {step + 1} of {steps}")
        if len(waiting) < at_once:
            waiting = torch.randperm(len(rows), generator=generator).tolist()
        chosen, waiting = waiting[:at_once], waiting[at_once:]
        optimizer.zero_grad()
        divergence_gradients(model, source, rows[chosen])
        optimizer.step()
        schedule.step()
    refined = dict(tensors)
    refined |= {name: linear.result() for name, linear in linears.items()}
    for name, norm in norms.items():
        stored = tensors[name]
        assert isinstance(stored, Tensor)
        refined[name] = norm.detach().to(stored.dtype)
    return refined


def whole_model(
    config: XverseConfig,
    tensors: Mapping[str, Tensor | QuantizedWeight],
    layer: Callable[[QuantizedWeight, nn.Parameter | None], nn.Module] = QuantLinear.from_weight,
) -> XverseForCausalLM:
    """A model in float32 from all its tensors, with a ``layer`` for each quantised linear; a quantised
    embedding is dequantised."""
    model = XverseForCausalLM.empty(dataclasses.replace(config, tie_word_embeddings=False))
    for name, tensor in sorted(
        tensors.items(), key=lambda item: not item[0].endswith(".bias")
    ):  # biases first
        module, kind = name.rsplit(".", 1)
        parent, _, child = module.rpartition(".")
        owner = model.get_submodule(module)
        if isinstance(tensor, QuantizedWeight) and isinstance(owner, nn.Linear):
            setattr(model.get_submodule(parent), child, layer(tensor, owner.bias))
            continue
        plain = tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor
        setattr(owner, kind, nn.Parameter(plain.float(), requires_grad=False))
    return model


def divergence_gradients(model: XverseForCausalLM, source: XverseForCausalLM, rows: Tensor) -> None:
    """Adds the gradients of the mean KL(source ‖ model) on ``rows`` int64 [n, T]; logits of few tokens are in
    memory at a time."""
    context = FullCausal(len(rows), rows.shape[1], rows.device)
    with torch.no_grad():
        expected = source.model(rows, context).flatten(0, 1)
    with torch.enable_grad():
        hidden = model.model(rows, context).flatten(0, 1)
        leaf = hidden.detach().requires_grad_()
        size = rows_at_once(model.config.vocab_size)
        for start in range(0, len(leaf), size):
            part = slice(start, start + size)
            with torch.no_grad():
                log_p = source.lm_head(expected[part]).log_softmax(-1)
            log_q = model.lm_head(leaf[part]).log_softmax(-1)
            ((log_p.exp() * (log_p - log_q)).sum() / len(leaf)).backward()
        hidden.backward(leaf.grad)
