"""``xverse finetune``: from settings to a trained model, through transformers' Trainer."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from xverse import hardware
from xverse.config import UserError
from xverse.finetune.card import write_card
from xverse.finetune.encode import Data, Example, load_data, stream_data
from xverse.finetune.launch import training_arguments
from xverse.finetune.methods import prepare, trainable
from xverse.finetune.optimizers import optimizer_maker
from xverse.finetune.preferences import KtoTrainer, PairTrainer, Preferences
from xverse.finetune.replay import Languages, add_replay
from xverse.finetune.resume import begin_anew, is_finished, resume_point, run_state, write_state
from xverse.finetune.safety import ReturnMemory, StopEarly, StopOnSignal, world_of
from xverse.finetune.settings import Settings
from xverse.finetune.stream import Stream
from xverse.finetune.trainer import FinetuneTrainer, Record, Rows, SavedTokenizer, order_seed, widest
from xverse.formats import ModelDirectory, load_model
from xverse.formats.adapters import fingerprint, write_base
from xverse.formats.quantize import quick_settings
from xverse.hf import XverseForCausalLM
from xverse.kernels.bfloat16 import conversion_bytes
from xverse.kernels.training import use_training_kernels
from xverse.log import notice
from xverse.plan import finetune_memory
from xverse.tokenizer import Tokenizer
from xverse.train.keeping import locked
from xverse.train.parallel import World
from xverse.train.plot import plot_loss
from xverse.train.survival import Interrupted, requests

ReadStream = Callable[[], Iterator[Example]]


def run_finetuning(settings: Settings) -> Path | None:
    """Train, evaluate and save as ``settings`` say; returns the finished model's directory.

    None on processes that save nothing and if nothing was trained. Raises UserError for every mistake that
    can be found before training, and if the loss stops being finite; Interrupted after SIGINT or SIGTERM,
    when a checkpoint has been saved.
    """
    args = training_arguments(settings)
    world = world_of(args)
    if not settings.do_train:
        return _run(settings, args, world)
    with locked(settings.output_dir, world):
        return _run(settings, args, world)


def _run(settings: Settings, args: TrainingArguments, world: World) -> Path | None:
    first = world.rank == 0
    source = ModelDirectory.named(settings.model_name_or_path)
    if source.scheme is not None and settings.finetuning_type != "lora":
        raise UserError(f"{source}: quantised weights cannot be trained; use finetuning_type lora")
    if args.world_size > 1:
        source.config.without_experts("fine-tuning on several processes")
    tokenizer = source.tokenizer
    _check_template(source, settings, first)
    length = _row_length(source, settings, first)
    data, read = _load_examples(settings, tokenizer, length, quiet=not first)
    state = run_state(settings, data)
    checkpoint = None
    if settings.do_train:
        if world.agreed(is_finished(settings, state)):
            world.say(f"{settings.output_dir}: this run is finished")
            return settings.output_dir if first else None
        checkpoint = resume_point(settings, state, world)
    predicted = _check_memory(source, settings, args, data, length) if settings.do_train else 0
    if args.device.type == "cpu":
        hardware.return_freed_memory()
    # Fingerprint the base before loading the model to train; later, two copies would be in memory.
    adapter = first and settings.do_train and settings.finetuning_type == "lora"
    digest = fingerprint(load_model(source)) if adapter else ""
    trainer = _make_trainer(source, settings, args, data, read, tokenizer, length)
    trainer.keep(world, functools.partial(write_base, base=settings.model_name_or_path, digest=digest))
    if not settings.do_train:
        metrics = trainer.evaluate()
        print(json.dumps(metrics)) if first else None
        return None
    if first:
        if checkpoint is None:
            begin_anew(settings)
        write_state(settings, state)
    languages = None
    if data.languages:
        languages = Languages(trainer, data.languages, tokenizer, settings.output_dir)
        trainer.add_callback(languages)
    metrics = _train(trainer, checkpoint, predicted)
    if settings.wants_evaluation:
        metrics |= trainer.evaluate()
    if languages is not None:
        data.bits = languages.compare()
    trainer.saver.finish(lambda: _save(trainer, settings, source, data, metrics, digest))
    if first:
        write_state(settings, {**state, "finished": trainer.state.global_step})
    return settings.output_dir if first else None


def _check_template(source: ModelDirectory, settings: Settings, first: bool) -> None:
    """Report a model without a chat format of its own. Raises UserError where ``template`` names another one
    than the model's."""
    if settings.stage == "pt" or source.model_type == "xverse":
        return
    if source.tokenizer.template is not None:
        if settings.template != "default":
            raise UserError(
                f"template '{settings.template}': {source} has a chat template of its own; use template "
                "default"
            )
    elif source.tokenizer.eos_id < 0:
        raise UserError(f"{source}: its tokenizer has neither a chat template nor an end of text")
    elif first:
        notice(f"{source}: has no chat template; dialogues are written in XVERSE's chat format")


def _row_length(source: ModelDirectory, settings: Settings, first: bool) -> int:
    """The longest example and packed row in tokens: cutoff_len, or the model's positions if fewer."""
    positions = source.config.context_length
    if positions < settings.cutoff_len and first:
        notice(
            f"cutoff_len {settings.cutoff_len} exceeds the model's {positions} positions; using {positions}"
        )
    return min(settings.cutoff_len, positions)


def _load_examples(
    settings: Settings, tokenizer: Tokenizer, length: int, quiet: bool
) -> tuple[Data, ReadStream | None]:
    """The encoded data; of a stream its first examples, and a function that reads it from the start."""
    read = None
    if settings.streaming:
        data, read = stream_data(settings, tokenizer, length)
    else:
        data = load_data(settings, tokenizer, length, quiet)
        if settings.replay and settings.do_train:
            add_replay(data, settings, tokenizer, length)
            notice(data.notes[-1]) if not quiet else None
    if settings.wants_evaluation and not data.valid:
        raise UserError("there are too few examples to hold one out for evaluation; set eval_dataset")
    return data, read


def _check_memory(
    source: ModelDirectory, settings: Settings, args: TrainingArguments, data: Data, length: int
) -> int:
    """The predicted peak in bytes, reported by the first process. Raises UserError if it does not fit."""
    seed = order_seed(args)
    group = 2 if settings.pairs else 1
    rows = Rows(data.train, length if settings.packs else None, seed, group, not settings.disable_shuffling)
    tokens, kept = widest(
        rows, args.per_device_train_batch_size, args.world_size, seed, settings.group_by_length
    )
    if settings.streaming:
        tokens = kept = args.per_device_train_batch_size * length
    stage = 0
    if settings.deepspeed:
        stage = json.loads(Path(str(args.deepspeed)).read_text()).get("zero_optimization", {}).get("stage", 0)
    stored = None
    if source.scheme is not None:
        stored = sum(file.stat().st_size for file in source.weight_files)
    load = finetune_memory.Load(
        tokens=tokens,
        kept=kept,
        processes=args.world_size,
        stage=stage,
        sharded=args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        stored_bytes=stored,
        conversion=conversion_bytes() if args.device.type == "cpu" else 0,
    )
    needed, line = finetune_memory.check(source.config, settings, load)
    if args.process_index == 0:
        notice(line)
    return needed


def _make_trainer(
    source: ModelDirectory,
    settings: Settings,
    args: TrainingArguments,
    data: Data,
    read: ReadStream | None,
    tokenizer: Tokenizer,
    length: int,
) -> FinetuneTrainer:
    model = _load_model(source, settings, args)
    if args.device.type == "cpu" and finetune_memory.keeps_freed(settings, source.scheme is not None):
        hardware.keep_freed_memory()
    if settings.use_liger_kernel:
        from xverse.finetune.liger import use_liger

        use_liger(model)
    set_seed(args.seed)  # Trainer would do so only after the adapter's weights are drawn
    model = prepare(model, settings)
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
    kind: Callable[..., FinetuneTrainer] = FinetuneTrainer
    if settings.pairs:
        kind = _pair_trainer(source, settings, args)
    trainer = kind(
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
        callbacks=[Record(settings.output_dir / "metrics.jsonl")],
    )
    trainer.remove_callback(ProgressCallback)  # stdout is for results
    trainer.remove_callback(PrinterCallback)
    if settings.early_stopping_steps is not None:
        trainer.add_callback(StopEarly(settings.early_stopping_steps))
    return trainer


def _pair_trainer(
    source: ModelDirectory, settings: Settings, args: TrainingArguments
) -> Callable[..., PairTrainer]:
    """The trainer of dpo and kto. Its reference is the model without its new adapter, or a second one."""
    second = settings.finetuning_type != "lora" or bool(settings.adapter_name_or_path or settings.ref_model)
    reference = None
    if second and settings.needs_reference:
        base = ModelDirectory.named(settings.ref_model) if settings.ref_model else source
        if base.config.vocab_size != source.config.vocab_size or base.tokenizer.hash != source.tokenizer.hash:
            raise UserError(f"ref_model {base}: its tokenizer differs from that of {source}")
        reference = _load_model(base, settings, args)
    kto = settings.stage == "kto"
    preferences = Preferences(
        kind="kto" if kto else settings.pref_loss,
        beta=settings.pref_beta,
        supervised=settings.pref_ftx,
        smoothing=settings.dpo_label_smoothing,
        gamma=settings.simpo_gamma,
        weights=(settings.kto_chosen_weight, settings.kto_rejected_weight),
    )
    return functools.partial(KtoTrainer if kto else PairTrainer, reference=reference, preferences=preferences)


def _load_model(source: ModelDirectory, settings: Settings, args: TrainingArguments) -> Any:
    """The base; weights in float32, unless DeepSpeed keeps master copies or only an adapter is trained."""
    half = torch.bfloat16 if args.bf16 or settings.pure_bf16 else torch.float16 if args.fp16 else None
    frozen = settings.finetuning_type == "lora" and args.bf16
    narrow = half is not None and (settings.deepspeed or settings.pure_bf16 or frozen)
    dtype = half if half is not None and narrow else torch.float32
    model: Any
    if _in_upstreams_layout(source):
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


def _train(trainer: FinetuneTrainer, checkpoint: str | None, predicted: int) -> dict[str, float]:
    """Train from ``checkpoint`` or from the start; returns Trainer's metrics and the memory in GB."""
    device = trainer.args.device
    hardware.reset_peak_memory(device)
    with requests() as signals:
        trainer.add_callback(StopOnSignal(signals))
        if device.type == "cpu":
            trainer.add_callback(ReturnMemory(predicted))
        metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    step = trainer.state.global_step
    if signals.stop and step < trainer.state.max_steps:
        if trainer.is_world_process_zero():
            notice(f"stopped after step {step}; checkpoint-{step} is saved, run the same command to continue")
        raise Interrupted
    metrics["memory_predicted_gb"] = predicted / 1e9
    metrics["memory_peak_gb"] = hardware.peak_memory(device) / 1e9
    if trainer.is_world_process_zero():
        notice(
            f"memory of a process: peak {metrics['memory_peak_gb']:.2f} GB, "
            f"{metrics['memory_predicted_gb']:.2f} GB predicted"
        )
    return metrics


def _save(
    trainer: FinetuneTrainer,
    settings: Settings,
    source: ModelDirectory,
    data: Data,
    metrics: dict[str, float],
    digest: str,
) -> None:
    """Write the model and its card; with an adapter also its base, whose fingerprint is ``digest``."""
    out = settings.output_dir
    model: Any = trainer.model
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if settings.finetuning_type != "lora" and not sharded:
        stored = load_model(source).lm_head.weight.dtype  # mapped, not read
        model.to(getattr(torch, settings.save_dtype) if settings.save_dtype else stored)
    if trainer.is_fsdp_enabled:  # checkpoints are sharded, the result is a model directory
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(out))
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    if settings.finetuning_type == "lora":
        write_base(out, settings.model_name_or_path, digest)
    trainer.save_metrics("all", metrics)
    if settings.plot_loss:
        plot_loss(out, f"fine-tuning {settings.model_name_or_path}")
    write_card(out, settings, data, metrics, trainer.state)
