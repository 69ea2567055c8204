"""``xverse finetune`` with flags: from settings to a trained model, through transformers' Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from xverse import hardware
from xverse.config import UserError
from xverse.files import atomic_file
from xverse.finetune.card import write_card
from xverse.finetune.encode import Data, Example, load_data, load_pairs, stream_data
from xverse.finetune.launch import training_arguments
from xverse.finetune.methods import prepare, trainable
from xverse.finetune.preferences import PairTrainer
from xverse.finetune.settings import Settings
from xverse.finetune.stream import Stream
from xverse.finetune.trainer import FinetuneTrainer, Record, Rows, widest
from xverse.formats import load_model, load_tokenizer, read_config, read_scheme, resolve
from xverse.formats.adapters import fingerprint, write_base
from xverse.formats.weights import weight_files
from xverse.kernels.training import use_training_kernels
from xverse.log import notice
from xverse.plan import finetune_memory
from xverse.train.plot import plot_loss

STATE = "finetune.json"
# Settings that may differ between a run and its continuation.
FREE = {
    "output_dir", "overwrite_output_dir", "overwrite_cache", "plot_loss", "resume_from_checkpoint",
    "preprocessing_num_workers", "padding_side", "local_rank", "do_eval", "report_to", "run_name",
    "disable_tqdm", "save_steps", "save_total_limit", "logging_steps", "logging_first_step", "dataset_dir",
    "dataloader_num_workers", "dataloader_pin_memory", "early_stopping_steps", "ddp_timeout",
}  # fmt: skip


def run_finetuning(settings: Settings) -> Path | None:
    """Train, evaluate and save what ``settings`` say; returns the finished model's directory.

    None on processes that save nothing and where nothing was trained. Raises UserError for every mistake
    that can be seen before training, and where the loss stops being a number.
    """
    args = training_arguments(settings)
    first = args.process_index == 0
    source = resolve(settings.model_name_or_path)
    if read_scheme(source) is not None and settings.finetuning_type != "lora":
        raise UserError(f"{source}: its weights are quantised and do not learn; finetuning_type lora does")
    tokenizer = load_tokenizer(source)
    length = min(settings.cutoff_len, read_config(source).context_length)
    if length < settings.cutoff_len and first:
        notice(f"cutoff_len {settings.cutoff_len}: the model has {length} positions; {length} it is")
    read = None
    if settings.streaming:
        data, read = stream_data(settings, tokenizer, length)
    else:
        load = load_pairs if settings.stage == "dpo" else load_data
        data = load(settings, tokenizer, length, quiet=not first)
    if settings.wants_evaluation and not data.valid:
        raise UserError("evaluation is asked for, and there is no example to hold out; name an eval_dataset")
    state = _state(settings, data)
    resume = _resume_point(settings, state)
    predicted = _check_memory(source, settings, args, data, length) if settings.do_train else 0

    if args.device.type == "cpu":
        hardware.return_freed_memory()
    # Before the model that trains is there: the base as it is stored is a second one.
    adapted = first and settings.do_train and settings.finetuning_type == "lora"
    digest = fingerprint(load_model(source)) if adapted else ""
    model = _load(source, settings, args)
    if args.device.type == "cpu" and finetune_memory.keeps_freed(settings, read_scheme(source) is not None):
        hardware.keep_freed_memory()
    if settings.use_liger_kernel or settings.enable_liger_kernel:
        from xverse.finetune.liger import use_liger

        use_liger(model)
    model = prepare(model, settings)
    learning, total = trainable(model)
    if first:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        notice(
            f"{learning:,} of {total:,} parameters learn; {rows} rows a step on {args.world_size} process(es)"
        )
    words = AutoTokenizer.from_pretrained(source)
    if settings.padding_side:
        words.padding_side = settings.padding_side
    kind: Callable[..., FinetuneTrainer] = FinetuneTrainer
    if settings.stage == "dpo":
        own = settings.finetuning_type != "lora" or settings.adapter_name_or_path is not None
        own = own and settings.pref_loss != "orpo"
        kind = functools.partial(
            PairTrainer,
            reference=_load(source, settings, args) if own else None,
            beta=settings.pref_beta,
            kind=settings.pref_loss,
            supervised=settings.pref_ftx,
        )
    packed = length if settings.packs else None
    stream = None
    if read is not None:
        count = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        stream = Stream(read, count, settings.buffer_size, packed, args.data_seed or args.seed)
    trainer = kind(
        model=model,
        args=args,
        examples=data.train,
        held_out=data.valid,
        row_length=packed,
        grouped=settings.by_length,
        stream=stream,
        pad_id=tokenizer.pad_id,
        processing_class=words,
        callbacks=[Record(settings.output_dir / "metrics.jsonl")],
    )
    trainer.remove_callback(ProgressCallback)  # stdout is for results
    trainer.remove_callback(PrinterCallback)
    if settings.early_stopping_steps is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_steps))
    metrics: dict[str, float] = {}
    if settings.do_train:
        if first:
            with atomic_file(settings.output_dir / STATE) as path:
                path.write_text(json.dumps(state, indent=1), encoding="utf-8")
        hardware.reset_peak_memory(args.device)
        metrics = dict(trainer.train(resume_from_checkpoint=resume).metrics)
        metrics["memory_predicted_gb"] = predicted / 1e9
        metrics["memory_peak_gb"] = hardware.peak_memory(args.device) / 1e9
        if first:
            notice(
                f"memory of a process: {metrics['memory_peak_gb']:.2f} GB at most, "
                f"{metrics['memory_predicted_gb']:.2f} GB predicted"
            )
    if settings.wants_evaluation:
        metrics |= trainer.evaluate()
    if not settings.do_train:
        print(json.dumps(metrics)) if first else None
        return None
    _save(trainer, settings, source, data, metrics, digest)
    return settings.output_dir if first else None


def _check_memory(source: Path, settings: Settings, args: TrainingArguments, data: Data, length: int) -> int:
    """The predicted peak in bytes, said by the first process. Raises UserError for what will not fit."""
    shape = read_config(source)
    seed = args.data_seed or args.seed
    group = 2 if settings.stage == "dpo" else 1
    rows = Rows(data.train, length if settings.packs else None, seed, group)
    tokens, kept = widest(rows, args.per_device_train_batch_size, args.world_size, seed, settings.by_length)
    if settings.streaming:
        tokens = kept = args.per_device_train_batch_size * length
    stage = 0
    if settings.deepspeed:
        stage = json.loads(Path(str(args.deepspeed)).read_text()).get("zero_optimization", {}).get("stage", 0)
    stored = None
    if read_scheme(source) is not None:
        stored = sum(file.stat().st_size for file in weight_files(source))
    work = finetune_memory.Load(
        tokens=tokens,
        kept=kept,
        processes=args.world_size,
        stage=stage,
        sharded=args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        stored_bytes=stored,
    )
    needed, said = finetune_memory.check(shape, settings, work)
    if args.process_index == 0:
        notice(said)
    return needed


def _load(source: Path, settings: Settings, args: TrainingArguments) -> Any:
    """Master weights in float32, unless DeepSpeed keeps its own or nothing but an adapter learns."""
    half = torch.bfloat16 if args.bf16 or settings.pure_bf16 else torch.float16 if args.fp16 else None
    frozen = settings.finetuning_type == "lora" and args.bf16
    narrow = half is not None and (settings.deepspeed or settings.pure_bf16 or frozen)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=half if narrow else torch.float32)
    if settings.quantization_bit:
        model.quantize(settings.quantization_bit)
    if settings.quantization_bit or read_scheme(source) is not None:
        # What is left of a mapped file would keep all that was read of it.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    if args.bf16 and not narrow:
        model.model.embed_tokens.register_forward_hook(as_autocast)
    model.config.use_cache = False
    if args.device.type == "cpu":
        use_training_kernels(model)
    return model


def as_autocast(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Embeddings in autocast's type, and the residual stream with them: as with weights of 16 bits (those of
    DeepSpeed, a frozen base, generation), so that float32 master weights give the same losses."""
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


def _state(settings: Settings, data: Data) -> dict[str, Any]:
    """What decides the losses of a run, and its data."""
    values = dataclasses.asdict(settings)
    kept = {name: value for name, value in values.items() if name not in FREE and value is not None}
    return {"settings": kept, "train": _digest(data.train), "valid": _digest(data.valid)}


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(str((example.ids, example.mask)).encode())
    return digest.hexdigest()


def _resume_point(settings: Settings, state: dict[str, Any]) -> str | None:
    """The checkpoint to go on from. Raises UserError for a folder with another run, or other files."""
    out = settings.output_dir
    if not settings.do_train:
        return None
    if settings.resume_from_checkpoint not in (None, "true", "True"):
        assert settings.resume_from_checkpoint is not None
        if not Path(settings.resume_from_checkpoint).is_dir():
            raise UserError(f"resume_from_checkpoint: no such folder: {settings.resume_from_checkpoint}")
        return settings.resume_from_checkpoint
    if settings.overwrite_output_dir or not out.is_dir() or not any(out.iterdir()):
        _clear(out)
        return None
    last = _last_checkpoint(out)
    file = out / STATE
    if last is None:
        if file.exists() and not any(out.glob("*.safetensors")):
            return None  # killed before its first checkpoint
        raise UserError(f"{out}: holds files already; --overwrite_output_dir true, or another output_dir")
    if file.exists():
        begun = json.loads(file.read_text(encoding="utf-8"))
        if begun != json.loads(json.dumps(state, default=str)):
            old = begun["settings"]
            changed = [
                f"{name} ({old.get(name)} → {state['settings'].get(name)})"
                for name in {**old, **state["settings"]}
                if str(old.get(name)) != str(state["settings"].get(name))
            ]
            raise UserError(
                f"{out}: was begun with other {', '.join(changed) or 'data'}; "
                "--overwrite_output_dir true begins anew"
            )
    if int(os.environ.get("RANK", "0")) == 0:
        notice(f"going on from {last}")
    return last


def _last_checkpoint(out: Path) -> str | None:
    """The last whole one: Trainer writes its state last, and a killed run may leave a part of one."""
    found = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        notice(f"{path}: is not whole; the run was stopped while it was written")
    return None


def _clear(out: Path) -> None:
    """A run that begins anew has no use for the curve of the old one."""
    if int(os.environ.get("RANK", "0")) == 0:
        (out / "metrics.jsonl").unlink(missing_ok=True)


def _save(
    trainer: FinetuneTrainer,
    settings: Settings,
    source: Path,
    data: Data,
    metrics: dict[str, float],
    digest: str,
) -> None:
    """Write the model and its card; of an adapter also its base, with that one's ``digest``."""
    out = settings.output_dir
    model: Any = trainer.model
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if not sharded and settings.finetuning_type != "lora":
        # As the base is stored (mapped from its files); float32 served training alone.
        model.to(load_model(source).lm_head.weight.dtype)
    if trainer.is_fsdp_enabled:  # shards are for checkpoints; the result is a model directory
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
