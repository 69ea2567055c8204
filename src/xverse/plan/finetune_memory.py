"""The predicted memory of a fine-tuning run; one that does not fit is refused with settings that do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xverse import hardware
from xverse.config import UserError
from xverse.device import compute_device
from xverse.model.chunks import logit_bytes
from xverse.model.config import XverseConfig

if TYPE_CHECKING:
    from xverse.finetune.settings import Settings

GROUP = 128  # weights with one scale, where they are quantised while loading
DENSE = 512  # tokens: rows up to this length compute whole score matrices (model/attention.py)
GROWTH = 40 * 2**20  # of the program on a CPU during training: libraries loaded late, matmul buffers


@dataclass(frozen=True)
class Load:
    """One process's work at a time: ``tokens`` in the widest micro-batch, ``kept`` of them with loss.
    ``stage`` is that of ZeRO (0: no DeepSpeed), ``sharded`` whether FSDP is used."""

    tokens: int
    kept: int
    processes: int = 1
    stage: int = 0
    sharded: bool = False
    stored_bytes: int | None = None  # of a base model that is stored quantised
    conversion: int = 0  # bytes that products of bfloat16 take besides their operands
    teacher_bytes: int = 0  # of a teacher's weights
    cache_tokens: int = 0  # of the replies that GRPO generates at the same time


def predict(shape: XverseConfig, settings: Settings, load: Load) -> dict[str, int]:
    """Peak bytes of one process, by kind, without the program itself.

    Activations are counted as autograd saves them, see ``_activations``. Autocast copies float32 weights in
    each forward pass, and the copies live until the backward pass. Freed memory is not counted: the program
    returns it to the system where it would be much (``keeps_freed``).
    """
    half = bool(settings.bf16 or settings.fp16 or settings.pure_bf16)
    size = 2 if half else 4
    vocabulary = shape.vocab_size * shape.hidden_size
    every = shape.num_parameters()
    layers = every - (1 if shape.tie_word_embeddings else 2) * vocabulary
    lora = settings.finetuning_type == "lora"
    learning = trainable_parameters(shape, settings)
    narrow = settings.pure_bf16 or (half and (load.stage > 0 or (lora and settings.bf16)))
    bits = settings.quantization_bit
    quantised = bool(bits or load.stored_bytes)
    stored = 2 if narrow else 4
    split = load.processes if load.sharded or load.stage == 3 else 1
    if load.stored_bytes:
        parameters: float = load.stored_bytes
    elif bits:
        parameters = layers * (bits / 8 + 2 / GROUP) + vocabulary * (1 + 2 / GROUP) + vocabulary * stored
    else:
        parameters = every * stored / split
    if lora:
        parameters += 4 * learning
    own_reference = settings.needs_reference and (
        not lora or settings.adapter_name_or_path or settings.ref_model
    )
    reference = every * stored if own_reference else 0
    copies = 0.0
    if half and not narrow:
        copies = 2 * (layers if not lora else 0) / split
    if settings.quantization_aware:  # the integers of a step; autograd saves each layer's rounded weights
        parameters += layers * (1 + 2 / GROUP)
        copies = size * layers / (shape.num_hidden_layers if settings.gradient_checkpointing else 1)
    states = load.processes if load.sharded or load.stage >= 1 else 1
    optimizer = 8 * learning / states
    if load.stage and half:
        optimizer += 4 * learning / states  # the master weights
    grad_split = load.processes if load.sharded or load.stage >= 2 else 1
    gradient_size = 2 if load.stage and half and not lora else 4
    gradients = gradient_size * learning / grad_split
    saved, again = _activations(shape, settings, load.tokens, size, quantised)
    head = 2 * size * load.kept * shape.hidden_size
    logits = settings.stage in ("dpo", "kto", "grpo") or bool(load.teacher_bytes)  # whole ones
    if settings.stage == "rm":
        head = 0
    elif logits:
        head += load.kept * shape.vocab_size * (size + 3 * 4)
    else:
        if compute_device().type == "cuda":
            head += logit_bytes(load.kept, shape.vocab_size, "cuda")
        else:
            plain = 3 * logit_bytes(load.kept, shape.vocab_size) // 2  # logits, their gradient and one copy
            head += max(plain, logit_bytes(load.kept, shape.vocab_size, kernels=_takes_kernels(half)))
        if quantised or (half and not narrow):
            head += 2 * vocabulary  # a copy of the head in the matmul's dtype
    head_learns = not lora and (settings.finetuning_type == "full" or "lm_head" in _extra(settings))
    if head_learns and not logits and settings.stage != "rm":
        head += 4 * vocabulary  # its gradient, computed in the forward pass
    # Gradients grow while activations are freed; only those of earlier micro-batches coexist with all of
    # them.
    earlier = gradients if (settings.gradient_accumulation_steps or 1) > 1 or load.stage else 0
    after = 4 * vocabulary if head_learns else 0  # a scaled copy, or the embedding's gradient
    loss = head + copies + after + (load.conversion if half else 0)
    working = max(gradients + again, earlier + saved + max(loss, again))
    held = saved if loss > again else saved + again
    if load.cache_tokens:  # generation and training take turns; merged, cast or gathered weights are copies
        copied = every * size if lora or half or split > 1 or settings.quantization_aware else 0
        shape_bytes = 2 * shape.kv_size * shape.num_hidden_layers * size
        working = max(working, copied + load.cache_tokens * shape_bytes)
    return {
        "weights": int(parameters + reference + load.teacher_bytes),
        "optimizer": int(optimizer),
        "gradients": int(earlier or gradients),
        "activations": int(held),
        "loss and copies": int(max(0, working - (earlier or gradients) - held)),
    }


def _takes_kernels(half: bool) -> bool:
    """Whether the loss computes in the CPU kernels."""
    if not half or compute_device().type != "cpu":
        return False
    from xverse.kernels.native import library

    return library() is not None


def keeps_freed(settings: Settings, stored_quantised: bool) -> bool:
    """Whether a run on a CPU should keep freed memory, which pays off where it costs little memory.

    In 16 bits without recomputation this makes a step a quarter faster, for 3 % more memory. Elsewhere blocks
    have many sizes, and the freed memory may be as large as the memory in use.
    """
    half = settings.bf16 or settings.fp16 or settings.pure_bf16
    quantised = stored_quantised or settings.quantization_bit
    return bool(half and not settings.pairs and not quantised and not settings.gradient_checkpointing)


def trainable_parameters(shape: XverseConfig, settings: Settings) -> int:
    """The number of trainable parameters, from the settings alone."""
    d, count, q, kv = shape.hidden_size, shape.num_hidden_layers, shape.attention_size, shape.kv_size
    vocabulary = shape.vocab_size * d
    if settings.finetuning_type == "full":
        return shape.num_parameters()
    sizes = [("q_proj", d, q), ("k_proj", d, kv), ("v_proj", d, kv), ("o_proj", q, d)]
    for width in shape.networks.values():
        sizes += [("gate_proj", d, width), ("up_proj", d, width), ("down_proj", width, d)]
    ends = {"lm_head": vocabulary, "embed_tokens": vocabulary, "norm": d}
    extra = sum(ends.get(name, 0) for name in _extra(settings))
    if settings.finetuning_type == "freeze":
        named = settings.freeze_trainable_modules
        chosen = [a * b for name, a, b in sizes if named == "all" or name in named]
        return sum(chosen) * min(count, abs(settings.freeze_trainable_layers)) + extra
    targets = settings.lora_target
    pairs = [a + b for name, a, b in sizes if targets == "all" or name in targets]
    return settings.lora_rank * sum(pairs) * count + extra


def _extra(settings: Settings) -> list[str]:
    named = (
        settings.additional_target if settings.finetuning_type == "lora" else settings.freeze_extra_modules
    )
    return [name.strip() for name in (named or "").split(",") if name.strip()]


def _activations(
    shape: XverseConfig, settings: Settings, tokens: int, size: int, quantised: bool
) -> tuple[int, int]:
    """Bytes that autograd saves, and bytes that are recomputed in the backward pass after the loss.

    For each layer and token: the inputs of both norms in float32, and in ``size`` bytes the norms' results,
    q, k, v, attention's output before and after transposing, and four rows of the MLP; with normed heads
    their inputs in float32. peft's adapter casts
    the input of its layer to another copy, except with a quantised weight. A recomputed layer counts twice,
    because its gradients are as large.
    """
    d, ff, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    q, kv = shape.attention_size, shape.kv_size
    if shape.num_experts:  # a token's input is gathered, and its result kept, for each expert that it uses
        ff = (ff + d) * shape.moe_top_k + ff * shape.num_shared_experts
    per_token = 8 * d + size * (2 * d + 3 * q + 2 * kv + 4 * ff) + shape.qk_norm * 4 * (q + kv)
    if settings.finetuning_type == "lora" and size == 2 and not quantised:
        per_token += size * 5 * d
    scores = 0
    if size == 2 and tokens <= DENSE and compute_device().type == "cpu":
        scores = 2 * size * shape.num_attention_heads * tokens**2
    if settings.gradient_checkpointing:
        return layers * tokens * size * d, 2 * (tokens * per_token + scores)
    return layers * (tokens * per_token + scores), 0


def check(shape: XverseConfig, settings: Settings, load: Load) -> tuple[int, str]:
    """The predicted peak in bytes, including the program itself, and a line that reports it.

    Raises UserError, which names settings that fit, if it exceeds this machine's available memory.
    """
    parts = predict(shape, settings, load)
    needed = sum(parts.values())
    device = compute_device().type
    available = hardware.available_memory(device)
    program = 0 if device == "cuda" else (hardware.process_memory("VmRSS") or 0) + GROWTH
    kinds = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    line = f"memory of a process, predicted: {(needed + program) / 1e9:.2f} GB ({kinds}"
    line += f", the program {program / 1e9:.2f})" if program else ")"
    if needed > available:
        fitting = [
            f"{changes} ({sum(predict(shape, changed, narrowed).values()) / 1e9:.1f} GB)"
            for changes, changed, narrowed in _smaller(settings, load)
            if sum(predict(shape, changed, narrowed).values()) <= available
        ]
        advice = "what fits: " + "; or ".join(fitting[:3]) if fitting else "no setting makes it fit"
        kind = "GPU memory" if device == "cuda" else "memory"
        raise UserError(
            f"needs {needed / 1e9:.1f} GB of {kind}, and {available / 1e9:.1f} GB are available; {advice}"
        )
    return needed + program, line


def _smaller(settings: Settings, load: Load) -> list[tuple[str, Settings, Load]]:
    """Changes that save memory, the least intrusive first; each is added to those before it."""
    smaller = []
    changes: list[str] = []

    def change(text: str, narrowed: Load, **values: object) -> None:
        nonlocal settings, load
        settings, load = dataclasses.replace(settings, **values), narrowed  # type: ignore[arg-type]  # of Settings
        changes.append(text)
        smaller.append((", ".join(changes), settings, load))

    if not settings.gradient_checkpointing:
        change("gradient_checkpointing true", load, gradient_checkpointing=True)
    rows = settings.per_device_train_batch_size or 8
    if rows > 1:
        one = dataclasses.replace(load, tokens=-(-load.tokens // rows), kept=-(-load.kept // rows))
        change("per_device_train_batch_size 1", one, per_device_train_batch_size=1)
    if not settings.bf16 and not settings.fp16:
        change("bf16 true", load, bf16=True)
    if settings.finetuning_type != "lora":
        whole_only: dict[str, object] = {"deepspeed": None, "save_dtype": None, "generation": {}}
        change("finetuning_type lora", load, finetuning_type="lora", **whole_only)
    if not settings.quantization_bit and not load.stored_bytes:
        change("quantization_bit 4", load, quantization_bit=4)
    return smaller
