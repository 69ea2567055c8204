"""Weights for a model that was built on the meta device: each process keeps only its part of each parameter.

A 7B model in float32 takes 29 GB. So that the eight processes of a machine need not each hold all of it,
parallelism is applied to a model without memory, and then one whole parameter at a time is generated or read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model
from xverse.formats.mapped import release
from xverse.model import XverseConfig, XverseForCausalLM, init_parameter

Weights = Iterable[tuple[str, Tensor]]  # whole parameters by name, one at a time


def initial_weights(config: XverseConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The values of ``init_weights`` on the CPU, float32, one parameter at a time."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in XverseForCausalLM.empty(config).named_parameters():
        yield name, init_parameter(torch.empty(parameter.shape), name, config, generator)


def stored_model(source: str | Path | ModelDirectory) -> tuple[XverseForCausalLM, Weights]:
    """The model of a directory on the meta device, and its tensors as mapped files, of which only the parts
    in use are read. Raises UserError as ``load_model`` does, and for quantised weights."""
    directory = ModelDirectory.of(source)
    if directory.scheme is not None:
        raise UserError(
            f"{directory}: its weights are quantised; train the model that they were quantised from"
        )
    model = load_model(directory)
    return XverseForCausalLM.empty(model.config), _given_back(model)


def _given_back(model: XverseForCausalLM) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
        release(parameter)


@torch.no_grad()
def materialise(
    model: nn.Module, modules: Sequence[nn.Module], weights: Weights, device: torch.device
) -> None:
    """Allocate a ``model`` from the meta device, sharded or not, on ``device`` and fill it, in place.

    ``modules`` together hold all of its parameters; under FSDP they must be the modules that it wraps.
    ``weights`` may include others, such as those of other pipeline stages. If it is empty, the values remain
    to be read from a checkpoint.
    """
    for module in modules:
        module.to_empty(device=device)
    if isinstance(model, XverseForCausalLM):  # whose shared weight became two
        model.tie()
    parameters = dict(model.named_parameters())
    filled = set()
    for name, tensor in weights:
        if name in parameters:
            put(tensor, parameters[name])
            filled.add(name)
    assert not filled or filled == parameters.keys(), f"no weights for {parameters.keys() - filled}"


@torch.no_grad()
def put(tensor: Tensor, parameter: Tensor) -> None:
    """Copy into ``parameter`` its part of a whole ``tensor``."""
    offset, local = held(parameter)
    part = tuple(slice(first, first + size) for first, size in zip(offset, local.shape, strict=True))
    local.copy_(tensor[part])


def held(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Of a tensor that may be sharded: the offset of this process's part in the whole, and the part, which
    shares its memory."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tensor
    box = tensor.shape, tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(*box)
    local = tensor.to_local()
    assert local.shape == shape
    return tuple(offset), local
