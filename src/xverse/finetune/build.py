"""The model and the trainer of a run, from its settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from xverse import hardware
from xverse.config import UserError
from xverse.engine.load import ending_ids
from xverse.finetune.distillation import DistillationTrainer
from xverse.finetune.encode import Data, Example
from xverse.finetune.grpo import GrpoTrainer
from xverse.finetune.methods import prepare, trainable
from xverse.finetune.optimizers import optimizer_maker
from xverse.finetune.preferences import KtoTrainer, PairTrainer
from xverse.finetune.quantization_aware import RoundAnew, round_in_training
from xverse.finetune.reward_model import RewardModel, RewardTrainer, classifier
from xverse.finetune.rewards import Rewards
from xverse.finetune.rollouts import Generator
from xverse.finetune.safety import StopEarly
from xverse.finetune.settings import Settings
from xverse.finetune.stream import Stream
from xverse.finetune.trainer import FinetuneTrainer, MetricsCallback, SavedTokenizer, order_seed
from xverse.formats import ModelDirectory, load_model
from xverse.formats.quantize import load_quantizing, quick_settings
from xverse.hf import XverseForCausalLM
from xverse.kernels.training import use_training_kernels
from xverse.log import notice
from xverse.plan import finetune_memory
from xverse.tokenizer import Tokenizer

ReadStream = Callable[[], Iterator[Example]]


def make_trainer(
    source: ModelDirectory,
    settings: Settings,
    args: TrainingArguments,
    data: Data,
    read: ReadStream | None,
    tokenizer: Tokenizer,
    length: int,
) -> FinetuneTrainer:
    """The trainer of the stage with its model, on every process. ``read`` gives a stream's examples anew;
    ``length`` is that of a packed row in tokens. Raises UserError for models that do not fit each other."""
    set_seed(args.seed)  # a reward model's head is drawn
    model = _load_model(source, settings, args, head=settings.stage == "rm")
    if args.device.type == "cpu" and finetune_memory.keeps_freed(settings, source.scheme is not None):
        hardware.keep_freed_memory()
    if settings.use_liger_kernel:
        from xverse.finetune.liger import use_liger

        use_liger(model)
    set_seed(args.seed)  # Trainer would do so only after the adapter's weights are drawn
    model = prepare(model, settings)
    if settings.quantization_aware:
        source.config.without_experts("quantization_aware")
        round_in_training(model, settings.quantization_aware)
    _set_generation(model, settings)
    learning, total = trainable(model)
    if args.process_index == 0:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        notice(
            f"{learning:,} of {total:,} parameters are trained; {rows} rows a step on {args.world_size} "
            "process(es)"
        )
    processing: Any = SavedTokenizer(tokenizer, settings.padding_side)
    if _in_upstreams_layout(source):
        processing = AutoTokenizer.from_pretrained(source.path)
        if settings.padding_side:
            processing.padding_side = settings.padding_side
    packed = length if settings.packs else None
    stream = None
    if read is not None:
        count = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        stream = Stream(read, count, settings.buffer_size, packed, order_seed(args))
    trainer = _kind_of_trainer(source, settings, args, data, tokenizer)(
        model=model,
        args=args,
        examples=data.train,
        held_out=data.valid,
        row_length=packed,
        grouped=settings.group_by_length,
        shuffled=not settings.disable_shuffling,
        optimizer=optimizer_maker(settings, args),
        stream=stream,
        pad_id=max(0, tokenizer.pad_id),  # of rows without loss, where any id will do
        processing_class=processing,
        callbacks=[MetricsCallback(settings.output_dir / "metrics.jsonl")],
    )
    trainer.remove_callback(ProgressCallback)  # stdout is for results
    trainer.remove_callback(PrinterCallback)
    if settings.quantization_aware:
        trainer.add_callback(RoundAnew())
    if settings.early_stopping_steps is not None:
        trainer.add_callback(StopEarly(settings.early_stopping_steps))
    return trainer


def _kind_of_trainer(
    source: ModelDirectory, settings: Settings, args: TrainingArguments, data: Data, tokenizer: Tokenizer
) -> Callable[..., FinetuneTrainer]:
    """The trainer of the stage. Its reference is the model without its new adapter, or a second one."""
    if settings.stage == "rm":
        return functools.partial(RewardTrainer, centring=settings.center_rewards_coefficient)
    if settings.teacher:
        teacher = _load_teacher(settings, args, source)
        return functools.partial(DistillationTrainer, teacher=teacher, settings=settings)
    if settings.stage not in ("dpo", "kto", "grpo"):
        return FinetuneTrainer
    second = settings.finetuning_type != "lora" or bool(settings.adapter_name_or_path or settings.ref_model)
    reference = None
    if second and settings.needs_reference:
        base = ModelDirectory.named(settings.ref_model) if settings.ref_model else source
        check_vocabulary("ref_model", base, source)
        reference = _load_model(base, settings, args)
    if settings.stage == "grpo":
        return functools.partial(
            GrpoTrainer,
            settings=settings,
            generator=_generator(source, settings, args, data, tokenizer),
            rewards=Rewards(settings, lambda folder: RewardModel(folder, tokenizer, args.device)),
            reference=reference,
        )
    kind = KtoTrainer if settings.stage == "kto" else PairTrainer
    return functools.partial(kind, reference=reference, settings=settings)


def half_type(settings: Settings, args: TrainingArguments) -> torch.dtype | None:
    """The 16-bit type that the run computes in; None: float32."""
    return torch.bfloat16 if args.bf16 or settings.pure_bf16 else torch.float16 if args.fp16 else None


def _load_teacher(settings: Settings, args: TrainingArguments, source: ModelDirectory) -> Any:
    """The teacher as a plain model, in the type that the run computes in."""
    teacher = ModelDirectory.named(str(settings.teacher))
    check_vocabulary("teacher", teacher, source)
    half = half_type(settings, args)
    bits = settings.teacher_quantization_bit
    if bits and teacher.scheme is not None:
        raise UserError(f"teacher {teacher}: is quantised already; remove teacher_quantization_bit")
    if bits:
        return load_quantizing(teacher, f"int{bits}", half or torch.float32)
    return load_model(teacher, half or torch.float32)


def check_vocabulary(name: str, other: ModelDirectory, source: ModelDirectory) -> None:
    """Raise UserError if another model, of the setting ``name``, has other tokens than ``source``."""
    if other.config.vocab_size != source.config.vocab_size or other.tokenizer.hash != source.tokenizer.hash:
        raise UserError(f"{name} {other}: its tokenizer differs from that of {source}")


def _generator(
    source: ModelDirectory, settings: Settings, args: TrainingArguments, data: Data, tokenizer: Tokenizer
) -> Generator:
    return Generator(
        tokenizer,
        settings.sampling(),
        ending_ids(source.generation_config, source.config.eos_token_id, tokenizer),
        max(len(prompt.ids) for prompt in (*data.train, *data.valid)),
        half_type(settings, args),
    )


def _load_model(
    source: ModelDirectory, settings: Settings, args: TrainingArguments, head: bool = False
) -> Any:
    """The base, with ``head`` as a reward model; weights in float32, unless DeepSpeed keeps master copies or
    only an adapter is trained."""
    half = half_type(settings, args)
    frozen = settings.finetuning_type == "lora" and args.bf16
    narrow = half is not None and (settings.deepspeed or settings.pure_bf16 or frozen)
    dtype = half if half is not None and narrow else torch.float32
    model: Any
    if head:
        model = classifier(source, dtype)
    elif _in_upstreams_layout(source):
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype)
    else:
        model = XverseForCausalLM.of(load_model(source, dtype), source.generation_config)
    if settings.quantization_bit:
        groups = quick_settings(f"int{settings.quantization_bit}", source.config).group_size
        model.quantize(settings.quantization_bit, group_size=groups)
    if settings.quantization_bit or source.scheme is not None:
        # A tensor that stays mapped would keep every page read from its file resident.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if args.bf16 and not narrow:
        model.model.embed_tokens.register_forward_hook(as_autocast)
    model.config.use_cache = False
    if args.device.type == "cpu":
        use_training_kernels(model)
    return model


def _in_upstreams_layout(source: ModelDirectory) -> bool:
    """Whether transformers' Auto classes read the directory as XVERSE's; ``load_model`` reads relatives, GGUF
    files and checkpoints."""
    return source.model_type == "xverse" and type(source) is ModelDirectory


def as_autocast(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Cast embeddings, and with them the residual stream, to autocast's type. 16-bit weights (DeepSpeed's, a
    frozen base's) have that type, so float32 master weights give the same losses."""
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


def _set_generation(model: Any, settings: Settings) -> None:
    """Put ``generation`` into the model's generation config. Raises UserError for unknown keys."""
    if settings.generation:
        unknown = model.generation_config.update(**settings.generation)
        if unknown:
            raise UserError(f"generation: transformers knows no {', '.join(unknown)}")
