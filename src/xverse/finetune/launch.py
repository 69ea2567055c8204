"""From settings to transformers' TrainingArguments, under every launcher."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from xverse.config import UserError, choose, need
from xverse.device import report_unused_gpu
from xverse.finetune.settings import Settings, split_names, training_values
from xverse.log import notice
from xverse.texts import read_object


def training_arguments(settings: Settings) -> TrainingArguments:
    """transformers' TrainingArguments. Raises UserError, in one line, for what they refuse."""
    values = training_values(settings)
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    sharded = bool(settings.fsdp) or by_launcher
    if settings.deepspeed:
        if by_launcher:
            raise UserError(
                "accelerate launches with FSDP, and --deepspeed shards the model, too; use one of them"
            )
        values["deepspeed"] = str(deepspeed_file(settings.deepspeed))
        _alone()
    if settings.save_dtype and (sharded or settings.deepspeed):
        raise UserError(
            "save_dtype cannot be combined with fsdp or deepspeed; convert the result with xverse export"
        )
    if settings.load_best_model_at_end and settings.evaluates == "epoch":
        values.setdefault("save_strategy", "epoch")
    for name, options in (
        ("lr_scheduler_kwargs", settings.scheduler_options),
        ("fsdp_config", settings.fsdp_options),
    ):
        values |= {name: options()} if name in values else {}
    values["report_to"] = _trackers(values["report_to"])
    values |= {
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,
        "prediction_loss_only": True,
    }
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would log its choice to stdout
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        values.setdefault("use_cpu", True)  # otherwise transformers refuses bf16
        report_unused_gpu(torch.device("cpu"))
    if settings.gradient_checkpointing:
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        args = TrainingArguments(**values)
        model: Any = torch.nn.Linear(1, 1)
        Trainer.get_optimizer_cls_and_kwargs(args, model)  # whose packages may be missing
    except (ValueError, ImportError, TypeError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"finetune: {text.replace('--', '')}") from None
    _one_gpu(args)
    if sharded and args.world_size == 1:
        raise UserError("--fsdp needs more than one process; launch with torchrun")
    if sharded and args.use_cpu:
        _shard_on_cpu()
    return args


def _trackers(text: str) -> list[str]:
    """The trackers of ``report_to``. Raises UserError for an unknown one and a missing package."""
    known = {name: name for name in ("none", "all", *INTEGRATION_TO_CALLBACK)}
    names = [choose("tracker in report_to", name, known) for name in split_names(text)]
    for name in names:
        if name == "tensorboard":
            need("tensorboard", "track", "report_to tensorboard", load=False)
        elif name == "wandb":
            need("wandb", "track", "report_to wandb", load=False)
        elif name in INTEGRATION_TO_CALLBACK:
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except Exception as error:  # each has its own
                raise UserError(f"report_to {name}: {' '.join(str(error).split())[:200]}") from None
    return names


def _one_gpu(args: TrainingArguments) -> None:
    """Without a launcher transformers would drive several GPUs by ``nn.DataParallel``, which cannot split a
    row that holds all examples; use one of them."""
    if args.n_gpu > 1:
        notice(
            f"training on 1 of {args.n_gpu} GPUs; to use all: "
            f"torchrun --nproc-per-node {args.n_gpu} -m xverse.cli finetune …"
        )
        args._n_gpu = 1


def _alone() -> None:
    """Set the variables that DeepSpeed reads, for a process without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if "RANK" not in os.environ:
        os.environ.update(values)


def _shard_on_cpu() -> None:
    """Let Accelerate shard on CPUs. PyTorch's FSDP2 works with gloo, but Accelerate would silently replicate
    the model there; it shards for every distributed type except MULTI_CPU."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def deepspeed_file(name: str) -> Path:
    """The file that ``--deepspeed`` names; a bare name without a local file means one of ``recipes/sft``.

    Raises UserError if there is none, or if DeepSpeed is not installed.
    """
    need("deepspeed", "finetune", "--deepspeed", load=False)
    path = Path(name).expanduser()
    if path.is_file():
        if "tensor_parallel" in read_object(path):  # whose split weights loss and adapters do not know
            raise UserError(
                f"--deepspeed {path}: tensor_parallel (AutoTP) is not supported; use ZeRO-3 or fsdp"
            )
        return path
    here = Path(__file__).resolve()
    for folder in (here.parents[3] / "recipes" / "sft", here.parent / "recipes"):  # a checkout, a wheel
        if path.parent == Path() and (folder / name).is_file():
            return folder / name
    raise UserError(f"--deepspeed {name}: no such file")
