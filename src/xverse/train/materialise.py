"""Weights for a model that was built on the meta device: of each parameter only this process's part is kept.

A 7B model in float32 is 29 GB, which the eight processes of a machine need not hold eight times to keep a
share each: parallelism is applied to a model without memory, and then one whole parameter at a time is made
or read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from xverse.config import UserError
from xverse.formats import load_model
from xverse.formats.directory import read_scheme
from xverse.formats.mapped import release
from xverse.model import XverseConfig, XverseForCausalLM, init_parameter

Weights = Iterable[tuple[str, Tensor]]  # whole parameters by name, in turn


def empty_model(config: XverseConfig) -> XverseForCausalLM:
    """A model on the meta device: shapes, and no memory."""
    with torch.device("meta"):
        return XverseForCausalLM(config)


def initial_weights(config: XverseConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """What ``init_weights`` gives a model on the CPU, float32, one parameter at a time."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in empty_model(config).named_parameters():
        yield name, init_parameter(torch.empty(parameter.shape), name, config, generator)


def stored_model(source: Path) -> tuple[XverseForCausalLM, Weights]:
    """The model of a directory on the meta device, and its tensors: mapped files, of which no more is read
    than is used. Raises UserError as ``load_model`` does, and for quantised weights."""
    if read_scheme(source) is not None:
        raise UserError(f"{source}: its weights are quantised; training begins with those they were made of")
    model = load_model(source)
    return empty_model(model.config), _given_back(model)


def _given_back(model: XverseForCausalLM) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
        release(parameter)


@torch.no_grad()
def materialise(
    model: nn.Module, modules: Sequence[nn.Module], weights: Weights, device: torch.device
) -> None:
    """Give ``model`` on the meta device, sharded or not, its memory on ``device`` and its values, in place.

    ``modules`` together hold all of its parameters; those under FSDP must be told by the module it wraps.
    ``weights`` may have others too, such as those of other stages of a pipeline; where there are none at all,
    all values are still to be read from a checkpoint.
    """
    for module in modules:
        module.to_empty(device=device)
    parameters = dict(model.named_parameters())
    found = set()
    for name, tensor in weights:
        if name in parameters:
            put(tensor, parameters[name])
            found.add(name)
    assert not found or found == parameters.keys(), f"no weights for {parameters.keys() - found}"


@torch.no_grad()
def put(tensor: Tensor, parameter: Tensor) -> None:
    """Copy of a whole ``tensor`` what ``parameter`` holds of it."""
    offset, local = held(parameter)
    part = tuple(slice(first, first + size) for first, size in zip(offset, local.shape, strict=True))
    local.copy_(tensor[part])


def held(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """What this process has of a tensor that may be sharded, sharing its memory, and where that begins in the
    whole."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tensor
    box = tensor.shape, tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(*box)
    local = tensor.to_local()
    assert local.shape == shape
    return tuple(offset), local
