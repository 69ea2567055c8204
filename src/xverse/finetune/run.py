"""``xverse finetune``: from settings to a trained model, through transformers' Trainer."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from xverse import hardware
from xverse.config import UserError
from xverse.finetune.build import ReadStream, half_type, make_trainer
from xverse.finetune.card import write_card
from xverse.finetune.encode import Data, load_data, stream_data
from xverse.finetune.launch import training_arguments
from xverse.finetune.quantization_aware import write_rounded
from xverse.finetune.replay import Languages, add_replay
from xverse.finetune.resume import (
    PREFIX,
    begin_anew,
    checkpoints_of,
    is_finished,
    resume_point,
    run_state,
    write_state,
)
from xverse.finetune.rollouts import AT_ONCE
from xverse.finetune.safety import ReturnMemory, StopOnSignal, world_of
from xverse.finetune.settings import Settings
from xverse.finetune.trainer import FinetuneTrainer, Rows, order_seed, widest
from xverse.formats import ModelDirectory, load_model
from xverse.formats.adapters import fingerprint, write_base
from xverse.formats.quantize import quick_settings, stored_bytes
from xverse.kernels.bfloat16 import conversion_bytes
from xverse.log import notice
from xverse.place import Place, read_list
from xverse.plan import finetune_memory
from xverse.tokenizer import Tokenizer
from xverse.tokenizer.published import with_format
from xverse.train.copies import Copies
from xverse.train.keeping import locked
from xverse.train.parallel import World
from xverse.train.plot import plot_loss
from xverse.train.survival import Interrupted, requests
from xverse.train.trackers import tracker_errors
from xverse.values import CHAT_FORMATS


def run_finetuning(settings: Settings) -> Path | None:
    """Train, evaluate and save as ``settings`` say; returns the finished model's directory.

    None on processes that save nothing and if nothing was trained. Raises UserError for every mistake that
    can be found before training, and if the loss stops being finite; Interrupted after SIGINT or SIGTERM,
    when a checkpoint has been saved.
    """
    place = Place.of(settings.output_dir)  # at a URL, the run's folder is in the cache
    settings = dataclasses.replace(settings, output_dir=place.local)
    args = training_arguments(settings)
    world = world_of(args)
    copies = Copies(place, checkpoints_of(place.local), settings.save_total_limit)
    if not settings.do_train:
        return _run(settings, args, world, copies)
    with locked(settings.output_dir, world):
        copies.bring(world, anew=settings.overwrite_output_dir)
        return _run(settings, args, world, copies)


def _run(settings: Settings, args: TrainingArguments, world: World, copies: Copies) -> Path | None:
    first = world.rank == 0
    source = ModelDirectory.named(settings.model_name_or_path)
    if source.scheme is not None and settings.finetuning_type != "lora":
        raise UserError(f"{source}: quantised weights cannot be trained; use finetuning_type lora")
    if source.scheme is not None and settings.quantization_aware:
        raise UserError(f"{source}: its weights are quantised already; remove quantization_aware")
    if args.world_size > 1:
        source.config.without_experts("fine-tuning on several processes")
    tokenizer = _with_template(source, settings, first)
    length = _row_length(source, settings, first)
    data, read = _load_examples(settings, tokenizer, length, quiet=not first)
    state = run_state(settings, data)
    checkpoint = None
    if settings.do_train:
        if world.agreed(is_finished(settings, state)):
            world.say(f"{settings.output_dir}: this run is finished")
            if first and copies.place.url and not read_list(copies.place.url):
                copies.place.send(skip=PREFIX)
            return settings.output_dir if first else None
        checkpoint = resume_point(settings, state, world)
    predicted = _check_memory(source, settings, args, data, length) if settings.do_train else 0
    if args.device.type == "cpu":
        hardware.return_freed_memory()
    # Fingerprint the base before loading the model to train; later, two copies would be in memory.
    adapter = first and settings.do_train and settings.finetuning_type == "lora"
    digest = fingerprint(load_model(source)) if adapter else ""
    trainer = make_trainer(source, settings, args, data, read, tokenizer, length)
    write = functools.partial(write_base, base=settings.model_name_or_path, digest=digest)
    trainer.keep(world, write, copies)
    if not settings.do_train:
        metrics = trainer.evaluate()
        print(json.dumps(metrics)) if first else None
        return None
    trainer.check_metric()
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
        copies.place.send(skip=PREFIX)
    return settings.output_dir if first else None


def _with_template(source: ModelDirectory, settings: Settings, first: bool) -> Tokenizer:
    """The tokenizer with the chat format of ``template``. Reports a model without a format of its own. Raises
    UserError where ``template`` names another one than the model's."""
    tokenizer = source.tokenizer
    if settings.template in CHAT_FORMATS:
        source.tokenizer = with_format(tokenizer, settings.template, str(source))  # that of all its readers
        return source.tokenizer
    if settings.stage == "pt" or source.model_type == "xverse":
        return tokenizer
    if tokenizer.template is not None:
        if settings.template != "default":
            raise UserError(
                f"template '{settings.template}': {source} has a chat template of its own; use template "
                "default"
            )
    elif tokenizer.eos_id < 0:
        raise UserError(f"{source}: its tokenizer has neither a chat template nor an end of text")
    elif first:
        notice(f"{source}: has no chat template; dialogues are written in XVERSE's chat format")
    return tokenizer


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
    cache_tokens = 0
    if settings.stage == "grpo":
        rows_at_once = args.per_device_train_batch_size
        longest = max(len(prompt.ids) for prompt in data.train)
        kept = rows_at_once * settings.max_completion_length
        tokens = rows_at_once * longest + kept
        replies = min(AT_ONCE, rows_at_once * args.gradient_accumulation_steps)
        cache_tokens = replies * (longest + settings.max_completion_length)
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
        teacher_bytes=_teacher_bytes(settings, half_type(settings, args) is not None),
        cache_tokens=cache_tokens,
    )
    needed, line = finetune_memory.check(source.config, settings, load)
    if args.process_index == 0:
        notice(line)
    return needed


def _teacher_bytes(settings: Settings, half: bool) -> int:
    if settings.teacher is None:
        return 0
    teacher = ModelDirectory.named(settings.teacher)
    if teacher.scheme is not None:
        return sum(file.stat().st_size for file in teacher.weight_files)
    bits = settings.teacher_quantization_bit
    if bits:
        return stored_bytes(teacher.config, quick_settings(f"int{bits}", teacher.config))
    return teacher.config.num_parameters() * (2 if half else 4)


def _train(trainer: FinetuneTrainer, checkpoint: str | None, predicted: int) -> dict[str, float]:
    """Train from ``checkpoint`` or from the start; returns Trainer's metrics and the memory in GB."""
    device = trainer.args.device
    hardware.reset_peak_memory(device)
    with requests() as signals:
        trainer.add_callback(StopOnSignal(signals))
        if device.type == "cpu":
            trainer.add_callback(ReturnMemory(predicted))
        with tracker_errors("report_to"):
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
    if settings.quantization_aware:
        write_rounded(
            trainer.accelerator.unwrap_model(trainer.model_wrapped if sharded else model),
            out / settings.quantization_aware,
            source.tokenizer,
            load_model(source).lm_head.weight.dtype,
            source.generation_config,
            trainer.is_world_process_zero(),
        )
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
