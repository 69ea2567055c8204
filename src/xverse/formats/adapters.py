"""Adapters in peft's format on the model of ``xverse.model``: apply, merge, and say what merging changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xverse.config import UserError, need
from xverse.formats.compare import fixed_tokens
from xverse.formats.compare import logits as logits_of
from xverse.formats.weights import read_object
from xverse.kernels.linear import QuantLinear
from xverse.log import notice
from xverse.model import FullCausal, XverseForCausalLM

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "xverse_base.json"
SAMPLES = 256  # values of each tensor that the fingerprint reads


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and evenly spread values of a model's tensors, whatever files hold them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.flatten()
        kept = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().cpu().numpy()
        digest.update(f"{name}{list(tensor.shape)}".encode() + kept.tobytes())
    return digest.hexdigest()


def write_base(path: Path, base: str, digest: str) -> None:
    """Remember beside an adapter which weights it was trained on."""
    text = json.dumps({"base": base, "fingerprint": digest}, indent=1) + "\n"
    (path / BASE).write_text(text, encoding="utf-8")


def apply_adapter(model: XverseForCausalLM, path: str | Path, base: str | Path | None = None) -> Any:
    """``model`` with the adapter of a directory on its layers, as peft's ``PeftModel``.

    ``base`` is the model's own directory: where the adapter says what it was trained on, the two are
    compared. Beside quantised weights it stays in its own precision (QLoRA). Raises UserError for a directory
    without adapter, for an adapter of another base, and for one whose tensors do not fit.
    """
    path = check_adapter(path)
    peft = import_peft()
    if base is not None:
        check_base(model, path, base)
    config = peft_config(model, path)
    config.task_type = None  # PeftModel for causal models wants transformers' generate, which ours has not
    config.inference_mode = True
    try:
        adapted = peft.PeftModel.from_pretrained(
            model, str(path), config=config, autocast_adapter_dtype=False
        )
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: the adapter does not fit the model: {text}") from None
    return adapted.eval()


def peft_config(model: nn.Module, path: Path) -> Any:
    """peft's configuration of an adapter, such that it fits quantised layers, too. Raises UserError for one
    that needs plain weights where there are others."""
    config = import_peft().PeftConfig.from_pretrained(str(path))
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        from xverse.formats.qlora import register

        if getattr(config, "use_dora", False):
            raise UserError(f"{path}: DoRA scales plain weights; export --adapter merges it into them")
        register(config)
    return config


def check_base(model: nn.Module, path: str | Path, base: str | Path) -> None:
    """Raises UserError where the adapter says that it was trained on other weights than those of ``model``,
    which ``base`` names; says it where the adapter does not tell."""
    file = Path(path) / BASE
    if not file.exists():
        notice(f"{path}: does not say which weights it was trained on; {base} is taken on trust")
        return
    stored = read_object(file)
    if stored.get("fingerprint") != fingerprint(model):
        raise UserError(f"{path}: this adapter was trained on {stored.get('base')}, not on {base}")


def merge_adapter(
    model: XverseForCausalLM, path: str | Path, base: str | Path | None = None
) -> tuple[XverseForCausalLM, float, float]:
    """``model`` with the adapter added into its weights, in their type; with max |Δlogit| and the mean KL
    divergence in nats against the adapter beside the weights, over ``fixed_tokens`` in float32.

    The weights may be mapped from a file: those that change are copied first. Raises as ``apply_adapter``.
    """
    merged, before = merge_and_logits(model, path, base)
    return merged, *differences(before, logits_of(merged, fixed_tokens(model.config.vocab_size)))


def merge_and_logits(
    model: XverseForCausalLM, path: str | Path, base: str | Path | None = None
) -> tuple[XverseForCausalLM, Tensor]:
    """As ``merge_adapter``, with the logits float32 [B, T, V] that the adapter beside the weights gives."""
    adapted = apply_adapter(model, path, base)
    before = _adapted_logits(adapted, model.config.vocab_size)  # [B, T, V]
    for module in adapted.modules():
        layer = getattr(module, "base_layer", None)
        if layer is not None and hasattr(module, "merge"):
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return adapted.merge_and_unload(), before


def differences(before: Tensor, after: Tensor) -> tuple[float, float]:
    """max |Δlogit|, and the mean KL(before ‖ after) over tokens in nats, of logits [B, T, V]."""
    return (before - after).abs().max().item(), _divergence(before, after)


@torch.no_grad()
def _adapted_logits(adapted: Any, vocab_size: int) -> Tensor:
    """The adapter's own arithmetic in float32, with weights that 16 bits hold widened for the moment."""
    tokens = fixed_tokens(vocab_size)
    stored = {name: parameter.data for name, parameter in adapted.named_parameters()}
    try:
        for parameter in adapted.parameters():
            parameter.data = parameter.data.float()
        context = FullCausal(*tokens.shape)
        out: Tensor = adapted.get_base_model()(tokens, context)
        return out.float()
    finally:
        for name, parameter in adapted.named_parameters():
            parameter.data = stored[name]


def _divergence(before: Tensor, after: Tensor) -> float:
    """Mean KL(before ‖ after) over tokens, in nats."""
    log_p, log_q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def check_adapter(path: str | Path) -> Path:
    """``path`` as a Path. Raises UserError where it holds no adapter in peft's format."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such adapter directory")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: holds no adapter: no {CONFIG}")
    return path


def import_peft() -> Any:
    return need("peft", "finetune", "an adapter")
