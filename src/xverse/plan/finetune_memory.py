"""What a run will need of memory, said before it starts; what will not fit is refused, with what would."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xverse import hardware
from xverse.config import UserError
from xverse.model.chunks import logit_bytes
from xverse.model.config import XverseConfig

if TYPE_CHECKING:
    from xverse.finetune.settings import Settings

GROUP = 128  # of weights that are quantised as they are loaded
DENSE = 512  # rows up to this length whose documents attend through whole score matrices (model/attention.py)
GROWTH = 40 * 2**20  # of the program on a CPU once it trains: libraries that load late, buffers of matmuls


@dataclass(frozen=True)
class Load:
    """What one process computes at a time: ``tokens`` in the widest micro-batch, ``kept`` of them with loss.
    ``stage`` is ZeRO's (0: DeepSpeed is not used), ``sharded`` FSDP's."""

    tokens: int
    kept: int
    processes: int = 1
    stage: int = 0
    sharded: bool = False
    stored_bytes: int | None = None  # of a base that is stored quantised


def predict(shape: XverseConfig, settings: Settings, load: Load) -> dict[str, int]:
    """Bytes that one process holds at its fullest, by kind, without the program itself.

    Activations are counted as autograd saves them, see ``_activations``. Weights in float32 are cast once for
    each forward pass under autocast, and the copies live until the backward pass. Nothing is added for memory
    that is free and kept: the program returns it where it would be much (``keeps_freed``).
    """
    half = bool(settings.bf16 or settings.fp16 or settings.pure_bf16)
    size = 2 if half else 4
    vocabulary = shape.vocab_size * shape.hidden_size
    every = shape.num_parameters()
    layers = every - 2 * vocabulary
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
    own_reference = (
        settings.stage == "dpo"
        and settings.pref_loss != "orpo"
        and (not lora or settings.adapter_name_or_path)
    )
    reference = every * stored if own_reference else 0
    copies = 0.0
    if half and not narrow:
        copies = 2 * (layers if not lora else 0) / split
    states = load.processes if load.sharded or load.stage >= 1 else 1
    optimizer = 8 * learning / states
    if load.stage and half:
        optimizer += 4 * learning / states  # the master weights
    grad_split = load.processes if load.sharded or load.stage >= 2 else 1
    gradient_size = 2 if load.stage and half and not lora else 4
    gradients = gradient_size * learning / grad_split
    saved, again = _activations(shape, settings, load.tokens, size, quantised)
    head = 2 * size * load.kept * shape.hidden_size
    if settings.stage == "dpo":
        head += load.kept * shape.vocab_size * (size + 3 * 4)
    else:
        plain = 3 * logit_bytes(load.kept, shape.vocab_size) // 2  # logits, their gradient and one copy
        head += max(plain, logit_bytes(load.kept, shape.vocab_size, kernels=_takes_kernels(half)))
        if quantised or (half and not narrow):
            head += 2 * vocabulary  # the head once more, in the type of the matmul
    head_learns = not lora and (settings.finetuning_type == "full" or "lm_head" in _extra(settings))
    if head_learns and settings.stage != "dpo":
        head += 4 * vocabulary  # its gradient, made in the forward pass
    # Gradients grow while activations go; only those of earlier micro-batches are there beside all of them.
    earlier = gradients if (settings.gradient_accumulation_steps or 1) > 1 or load.stage else 0
    after = 4 * vocabulary if head_learns else 0  # a scaled copy, or a first one of the embedding's
    loss = head + copies + after
    working = max(gradients + again, earlier + saved + max(loss, again))
    held = saved if loss > again else saved + again
    return {
        "weights": int(parameters + reference),
        "optimizer": int(optimizer),
        "gradients": int(earlier or gradients),
        "activations": int(held),
        "loss and copies": int(max(0, working - (earlier or gradients) - held)),
    }


def _takes_kernels(half: bool) -> bool:
    """Whether the loss computes in the CPU kernels."""
    if not half or hardware.compute_device().type != "cpu":
        return False
    from xverse.kernels.native import library

    return library() is not None


def keeps_freed(settings: Settings, stored_quantised: bool) -> bool:
    """Whether a run on a CPU should keep the memory that it frees: where that costs little of it.

    In 16 bits without recomputation a step is a quarter faster so, for 3 % more memory. Elsewhere the blocks
    are of many sizes, and what is kept may be as much again as what lives.
    """
    half = settings.bf16 or settings.fp16 or settings.pure_bf16
    quantised = stored_quantised or settings.quantization_bit
    return bool(half and settings.stage != "dpo" and not quantised and not settings.gradient_checkpointing)


def trainable_parameters(shape: XverseConfig, settings: Settings) -> int:
    """How many numbers learn, by the settings alone."""
    d, ff, count = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    vocabulary = shape.vocab_size * d
    if settings.finetuning_type == "full":
        return shape.num_parameters()
    sizes = {"q_proj": (d, d), "k_proj": (d, d), "v_proj": (d, d), "o_proj": (d, d)}
    sizes |= {"gate_proj": (d, ff), "up_proj": (d, ff), "down_proj": (ff, d)}
    ends = {"lm_head": vocabulary, "embed_tokens": vocabulary, "norm": d}
    extra = sum(ends.get(name, 0) for name in _extra(settings))
    if settings.finetuning_type == "freeze":
        named = settings.freeze_trainable_modules
        chosen = [a * b for name, (a, b) in sizes.items() if named == "all" or name in named]
        return sum(chosen) * min(count, abs(settings.freeze_trainable_layers)) + extra
    targets = sizes if settings.lora_target == "all" else settings.lora_target
    pairs = [a + b for name, (a, b) in sizes.items() if name in targets]
    return settings.lora_rank * sum(pairs) * count + extra


def _extra(settings: Settings) -> list[str]:
    named = (
        settings.additional_target if settings.finetuning_type == "lora" else settings.freeze_extra_modules
    )
    return [name.strip() for name in (named or "").split(",") if name.strip()]


def _activations(
    shape: XverseConfig, settings: Settings, tokens: int, size: int, quantised: bool
) -> tuple[int, int]:
    """Bytes of what autograd saves, and of what is made again in the backward pass, after the loss.

    Of each layer and token: the inputs of both norms in float32, and in ``size`` bytes the norms' results, q,
    k, v, what attention mixed and gathered, and four rows of the MLP. peft's adapter casts the input of its
    layer to a copy of its own, that beside a quantised weight does not. A layer that is made again is counted
    twice, its gradients as large as itself.
    """
    d, ff, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    each = 8 * d + size * (7 * d + 4 * ff)
    if settings.finetuning_type == "lora" and size == 2 and not quantised:
        each += size * 5 * d
    scores = 0
    if size == 2 and tokens <= DENSE and hardware.compute_device().type == "cpu":
        scores = 2 * size * shape.num_attention_heads * tokens**2
    if settings.gradient_checkpointing:
        return layers * tokens * size * d, 2 * (tokens * each + scores)
    return layers * (tokens * each + scores), 0


def check(shape: XverseConfig, settings: Settings, load: Load) -> tuple[int, str]:
    """The prediction in bytes, the program's own memory included, and one line that says it.

    Raises UserError, naming settings that would fit, where this machine has not as much.
    """
    parts = predict(shape, settings, load)
    needed = sum(parts.values())
    device = hardware.compute_device().type
    there = hardware.available_memory(device)
    before = 0 if device == "cuda" else (hardware.process_memory("VmRSS") or 0) + GROWTH
    said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    line = f"memory of a process, predicted: {(needed + before) / 1e9:.2f} GB ({said}"
    line += f", the program {before / 1e9:.2f})" if before else ")"
    if needed > there:
        fitting = [
            f"{words} ({sum(predict(shape, changed, narrowed).values()) / 1e9:.1f} GB)"
            for words, changed, narrowed in _smaller(settings, load)
            if sum(predict(shape, changed, narrowed).values()) <= there
        ]
        way = "what would fit: " + "; or ".join(fitting[:3]) if fitting else "no setting here makes it fit"
        kind = "GPU memory" if device == "cuda" else "memory"
        raise UserError(f"needs {needed / 1e9:.1f} GB of {kind}, and {there / 1e9:.1f} GB are free; {way}")
    return needed + before, line


def _smaller(settings: Settings, load: Load) -> list[tuple[str, Settings, Load]]:
    """Changes that save memory, the ones that change least first; each comes on top of those before it."""
    found = []
    words: list[str] = []

    def change(text: str, narrowed: Load, **values: object) -> None:
        nonlocal settings, load
        settings, load = dataclasses.replace(settings, **values), narrowed  # type: ignore[arg-type]  # of Settings
        words.append(text)
        found.append((", ".join(words), settings, load))

    if not settings.gradient_checkpointing:
        change("gradient_checkpointing true", load, gradient_checkpointing=True)
    rows = settings.per_device_train_batch_size or 8
    if rows > 1:
        one = dataclasses.replace(load, tokens=-(-load.tokens // rows), kept=-(-load.kept // rows))
        change("per_device_train_batch_size 1", one, per_device_train_batch_size=1)
    if not settings.bf16 and not settings.fp16:
        change("bf16 true", load, bf16=True)
    if settings.finetuning_type != "lora":
        change(
            "finetuning_type lora",
            load,
            finetuning_type="lora",
            deepspeed=None,
            save_dtype=None,
            generation={},
        )
    if not settings.quantization_bit and not load.stored_bytes:
        change("quantization_bit 4", load, quantization_bit=4)
    return found
