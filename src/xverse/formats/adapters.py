"""Apply adapters in peft's format to the model of ``xverse.model``, merge them and measure the difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xverse.config import UserError, need
from xverse.formats.compare import fixed_tokens
from xverse.kernels.linear import QuantLinear
from xverse.log import notice
from xverse.model import FullCausal, XverseForCausalLM
from xverse.texts import read_object

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "xverse_base.json"
SAMPLES = 256  # values of each tensor in the fingerprint


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and evenly spaced values of a model's tensors, independent of its files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().cpu().numpy()
        digest.update(f"{name}{list(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()


def write_base(path: Path, base: str, digest: str) -> None:
    """Record next to an adapter which weights it was trained on."""
    text = json.dumps({"base": base, "fingerprint": digest}, indent=1) + "\n"
    (path / BASE).write_text(text, encoding="utf-8")


def apply_adapter(model: XverseForCausalLM, path: str | Path, base: str | Path | None = None) -> Any:
    """``model`` with the adapter of a directory on its layers, as peft's ``PeftModel``.

    ``base`` is the model's directory; it is compared with the base that the adapter records. On quantised
    weights the adapter keeps its own precision (QLoRA). Raises UserError for a directory without an adapter,
    an adapter of another base, and one whose tensors do not fit.
    """
    path = check_adapter(path)
    if base is not None:
        check_base(lambda: fingerprint(model), path, base)
    config = peft_config(model, path)
    config.task_type = None  # PeftModelForCausalLM needs transformers' generate
    config.inference_mode = True
    return peft_model(model, path, config, autocast_adapter_dtype=False).eval()


def peft_model(model: Any, path: Path, config: Any, **options: Any) -> Any:
    """peft's model with the adapter of a directory. Raises UserError for one that does not fit or cannot be
    read."""
    try:
        return import_peft().PeftModel.from_pretrained(model, str(path), config=config, **options)
    except UserError:
        raise
    except Exception as error:  # peft and safetensors raise many kinds
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: the adapter does not fit the model: {text}") from None


def peft_config(model: nn.Module, path: Path) -> Any:
    """peft's configuration of an adapter, also for quantised layers. Raises UserError for one that needs
    plain weights if the model's are quantised."""
    peft = import_peft()
    read_object(path / CONFIG)  # whose message is better than peft's
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
    except Exception as error:  # it passes the file's values to constructors
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{path / CONFIG}: not in peft's format ({text})") from None
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        from xverse.formats.qlora import register

        if getattr(config, "use_dora", False):
            raise UserError(f"{path}: DoRA needs plain weights; merge it with xverse export --adapter")
        register(config)
    return config


def check_base(digest: Callable[[], str], path: str | Path, base: str | Path) -> None:
    """Raise UserError if the adapter was trained on other weights than those of ``base``, whose fingerprint
    is ``digest()``; print a notice if the adapter does not record its base."""
    file = Path(path) / BASE
    if not file.exists():
        config = Path(path) / CONFIG
        named = read_object(config).get("base_model_name_or_path") if config.exists() else None
        of = f" beyond the name '{named}'" if named else ""
        notice(f"{path}: does not record its base{of}; assuming {base}")
        return
    stored = read_object(file)
    if stored.get("fingerprint") != digest():
        raise UserError(f"{path}: this adapter was trained on {stored.get('base')}, not on {base}")


def merged(model: XverseForCausalLM, path: str | Path, base: str | Path | None = None) -> XverseForCausalLM:
    """``model`` with the adapter merged into its weights, in their dtype.

    Weights may be mapped from a file; those that change are copied first. Raises as ``apply_adapter`` does.
    """
    return _merge(apply_adapter(model, path, base))


def merge_and_logits(
    model: XverseForCausalLM, path: str | Path, base: str | Path | None = None
) -> tuple[XverseForCausalLM, Tensor]:
    """As ``merged``, with the logits float32 [B, T, V] of the unmerged adapter for ``fixed_tokens``."""
    adapted = apply_adapter(model, path, base)
    before = _adapted_logits(adapted, model.config.vocab_size)  # [B, T, V]
    return _merge(adapted), before


def _merge(adapted: Any) -> XverseForCausalLM:
    for module in adapted.modules():
        layer = getattr(module, "base_layer", None)
        if layer is not None and hasattr(module, "merge"):
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    model: XverseForCausalLM = adapted.merge_and_unload()
    return model


def differences(before: Tensor, after: Tensor) -> tuple[float, float]:
    """max |Δlogit|, and the mean KL(before ‖ after) over tokens in nats, of logits [B, T, V]."""
    log_p, log_q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return (before - after).abs().max().item(), divergence


@torch.no_grad()
def _adapted_logits(adapted: Any, vocab_size: int) -> Tensor:
    """Logits of the unmerged adapter in float32; 16-bit weights are widened temporarily."""
    tokens = fixed_tokens(vocab_size).to(next(adapted.parameters()).device)
    stored = {name: parameter.data for name, parameter in adapted.named_parameters()}
    try:
        for parameter in adapted.parameters():
            parameter.data = parameter.data.float()
        context = FullCausal(tokens.shape[0], tokens.shape[1], tokens.device)
        out: Tensor = adapted.get_base_model()(tokens, context)
        return out.float().cpu()
    finally:
        for name, parameter in adapted.named_parameters():
            parameter.data = stored[name]


def check_adapter(path: str | Path, scores: bool = False) -> Path:
    """``path`` as a Path. Raises UserError if it does not hold an adapter in peft's format, of a model that
    writes text or, if ``scores``, of a reward model."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such adapter directory")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: not an adapter directory: no {CONFIG}")
    if (read_object(path / CONFIG).get("task_type") == "SEQ_CLS") != scores:
        what = (
            "not the adapter of a reward model"
            if scores
            else ("the adapter of a reward model, which scores texts and writes none; reward_funcs takes it")
        )
        raise UserError(f"{path}: is {what}")
    return path


def import_peft() -> Any:
    return need("peft", "finetune", "an adapter")
