"""LoRA adapters in peft's format, read as pairs of matrices for each linear layer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from xverse.config import UserError
from xverse.formats.adapters import CONFIG, WEIGHTS
from xverse.formats.weights import read_tensors
from xverse.kernels.linear import QuantLinear
from xverse.texts import read_object

Pair = tuple[Tensor, Tensor]  # a [rank, in] and b [rank, out], float32; b is scaled

# Settings of peft that change what an adapter computes in a way that is not applied here.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules trained in full",
    "target_parameters": "parameters without a layer",
    "trainable_token_indices": "trained embeddings",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "biases",
    "fan_in_fan_out": "transposed weights",
    "megatron_config": "Megatron's layers",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
}
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


def read_lora(path: Path, model: nn.Module, most_rank: int) -> tuple[bytes, dict[str, Pair]]:
    """The adapter in the directory ``path``, by the names of the layers of ``model``, and a digest of what it
    computes. Raises UserError for an adapter of another kind, one that does not fit, and a rank above
    ``most_rank``."""
    config = read_object(path / CONFIG)
    _check_kind(path, config)
    halves: dict[str, dict[str, Tensor]] = {}
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path}: has no {WEIGHTS}")
    for name, tensor in read_tensors(path / WEIGHTS):
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"{path}: {name} cannot be applied unmerged; merge the adapter with xverse export --adapter"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor.float()
    if not halves:
        raise UserError(f"{path}: {WEIGHTS} has no tensors")
    digest = hashlib.sha256()
    pairs: dict[str, Pair] = {}
    for name, half in sorted(halves.items()):
        a, b = _checked(path, model, name, half, _setting(path, config, "r", "rank_pattern", name), most_rank)
        alpha = _setting(path, config, "lora_alpha", "alpha_pattern", name)
        rank = len(a)
        b = (b * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))).T.contiguous()
        pairs[name] = a.contiguous(), b
        digest.update(json.dumps([name, *a.shape, *b.shape]).encode())
        digest.update(pairs[name][0].numpy().tobytes() + b.numpy().tobytes())
    return digest.digest(), pairs


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}; only LORA adapters can be applied unmerged")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise UserError(
                f"{path}: {key} ({what}) cannot be applied unmerged; merge the adapter with xverse export "
                "--adapter"
            )
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {config['bias']!r}; only adapters without biases can be applied")


def _setting(path: Path, config: dict[str, Any], key: str, patterns: str, name: str) -> float:
    """A layer's rank or alpha: that of the first pattern that its name ends with, or the adapter's."""
    number: Any = config.get(key)
    given = config.get(patterns) or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: {CONFIG}: {patterns} is {given!r}, not an object")
    for pattern, value in given.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                number = value
                break
        except re.error:
            raise UserError(f"{path}: {patterns}: {pattern!r} is not a regular expression") from None
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 2**63:
        raise UserError(f"{path}: {CONFIG}: {key} is {number!r}, not a number")
    return number


def _checked(
    path: Path, model: nn.Module, name: str, half: dict[str, Tensor], rank: float, most_rank: int
) -> Pair:
    """The two matrices of a layer as they are stored, float32 [rank, in] and [out, rank]."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"{path}: the adapter does not fit: the model has no layer {name}") from None
    if not isinstance(layer, nn.Linear | QuantLinear):
        raise UserError(f"{path}: the adapter does not fit: {name} is not a linear layer")
    if half.keys() != {"A", "B"}:
        raise UserError(f"{path}: {name} has only one of lora_A and lora_B")
    a, b = half["A"], half["B"]
    shapes = [*a.shape], [*b.shape]
    expected = [int(rank), layer.in_features], [layer.out_features, int(rank)]
    if a.dim() == b.dim() == 2 and len(a) == b.shape[1] != rank:
        raise UserError(f"{path}: {name} has rank {len(a)} where {CONFIG} says {rank:g}")
    if shapes != expected:
        raise UserError(
            f"{path}: the adapter does not fit: {name} has {shapes[0]} and {shapes[1]}, the model needs "
            f"{expected[0]} and {expected[1]}"
        )
    if not 1 <= rank <= most_rank:
        raise UserError(f"{path}: rank {rank:g} is out of range (1 to {most_rank}; --max-lora-rank)")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError(f"{path}: {name} holds NaN or infinity")
    return a, b
