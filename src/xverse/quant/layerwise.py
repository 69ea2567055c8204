"""One decoder layer at a time: built from tensors, run over hidden states, measured and replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xverse.model import FullCausal, XverseConfig
from xverse.model.rope import rope_tables
from xverse.model.transformer import DecoderLayer, RMSNorm, norm_of
from xverse.quant.equalize import InputRMS
from xverse.quant.gptq import Hessian

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
_TOKENS_AT_ONCE = 4096
_RMS_TOKENS = 2048  # enough to estimate the root mean square of a channel


def gates_and_ups(config: XverseConfig) -> tuple[str, ...]:
    """The linears that read the input of a layer's feed-forward networks, experts included."""
    return tuple(f"{name}.{kind}_proj" for name in config.networks for kind in ("gate", "up"))


def downs(config: XverseConfig) -> tuple[str, ...]:
    """The last linears of a layer's feed-forward networks."""
    return tuple(f"{name}.down_proj" for name in config.networks)


def make_layer(config: XverseConfig, number: int, tensors: Mapping[str, Tensor]) -> DecoderLayer:
    """Layer ``number`` from tensors by full name: float32 copies of its weights, its norms as stored."""
    prefix = f"model.layers.{number}."
    with torch.device("meta"):
        layer = DecoderLayer(config, number)
    for name, tensor in tensors.items():
        owner, kind = name.removeprefix(prefix).rsplit(".", 1)
        # Biases are balanced with their weights; norms keep their dtype.
        exact = tensor.dim() == 1 and kind == "weight"
        value = tensor if exact else tensor.to(torch.float32, copy=True)
        setattr(layer.get_submodule(owner), kind, nn.Parameter(value, requires_grad=False))
    return layer


def make_norm(weight: Tensor, config: XverseConfig) -> RMSNorm:
    """A norm of the model with ``weight`` [D]."""
    with torch.device("meta"):
        norm = norm_of(config, len(weight))
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


def batches(x: Tensor) -> tuple[Tensor, ...]:
    """Views [r, T, D] of some rows of ``x`` [n, T, D] at a time."""
    return x.split(max(1, _TOKENS_AT_ONCE // x.shape[1]))


def forward(layer: DecoderLayer, config: XverseConfig, x: Tensor) -> Tensor:
    """The layer's output for hidden states float32 [n, T, D] → [n, T, D]."""
    return torch.cat([layer(rows, *_context(config, rows)) for rows in batches(x)])


def input_rms(layer: DecoderLayer, config: XverseConfig, x: Tensor) -> InputRMS:
    """The root mean squares of the linears' inputs when the layer runs over some rows of ``x`` [n, T, D].
    Experts that none of the rows activates have none."""
    rows = x[:: max(1, x.shape[0] * x.shape[1] // _RMS_TOKENS)]
    squares: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            total = arguments[0].flatten(0, -2).square().sum(dim=0)
            squares[name] = squares[name] + total if name in squares else total

        return hook

    names = (QKV[0], *OUTPUT, "mlp", *downs(config))
    hooks = [layer.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    forward(layer, config, rows)
    for hook in hooks:
        hook.remove()
    count = rows.shape[0] * rows.shape[1]
    rms = {name: (total / count).sqrt() for name, total in squares.items()}
    qkv, o, gate_up = (rms.pop(name) for name in names[:3])
    return InputRMS(qkv, o, gate_up, rms)


def replace_linears(
    layer: DecoderLayer, config: XverseConfig, x: Tensor, replace: Callable[[tuple[str, ...], Hessian], None]
) -> None:
    """Calls ``replace(names, hessian)`` for the linears in the order of the forward pass; ``hessian`` is that
    of their inputs with the linears before them replaced. ``x`` [n, T, D] becomes the layer's output, in
    place."""
    attention: nn.Module = layer.self_attn
    mlp: nn.Module = layer.mlp
    hessian = Hessian(config.hidden_size, x.device)
    for rows in batches(x):
        hessian.add(layer.input_layernorm(rows))
    replace(QKV, hessian)

    output, attention.o_proj = attention.o_proj, nn.Identity()
    hessian = Hessian(config.attention_size, x.device)
    mixed = []
    for rows in batches(x):
        mixed.append(attention(layer.input_layernorm(rows), *_context(config, rows)))  # [r, T, H · head_dim]
        hessian.add(mixed[-1])
    attention.o_proj = output
    replace(OUTPUT, hessian)
    for rows, values in zip(batches(x), mixed, strict=True):
        rows += layer.get_submodule(OUTPUT[0])(values)
    del mixed

    hessian = Hessian(config.hidden_size, x.device)
    for rows in batches(x):
        hessian.add(layer.post_attention_layernorm(rows))
    replace(gates_and_ups(config), hessian)

    names = downs(config)
    sizes = {name: layer.get_parameter(f"{name}.weight").shape[1] for name in names}
    hessians = {name: Hessian(size, x.device) for name, size in sizes.items()}
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, hessian=hessian: hessian.add(inputs[0])
        )
        for name, hessian in hessians.items()
    ]
    for rows in batches(x):
        mlp(layer.post_attention_layernorm(rows))
    for hook in hooks:
        hook.remove()
    for name in names:  # one at a time: a Hessian may be as large as the weights of an expert
        replace((name,), hessians.pop(name))
    for rows in batches(x):
        rows += mlp(layer.post_attention_layernorm(rows))


def _context(config: XverseConfig, rows: Tensor) -> tuple[tuple[Tensor, Tensor], FullCausal]:
    """Rotary tables and plain causal attention for rows [r, T, D]."""
    context = FullCausal(len(rows), rows.shape[1], rows.device)
    return rope_tables(context.positions, config), context
