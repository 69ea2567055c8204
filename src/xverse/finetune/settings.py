"""The flags of ``xverse finetune``: LLaMA-Factory's and transformers' names, with their meanings.

One frozen dataclass is the command line, the YAML form and the list of what is known. Nothing heavy is
imported here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xverse.config import UserError, build

TEMPLATES = ("default", "xverse")
HELD_OUT = 0.01  # where evaluation is asked for and no validation set is named


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train on what, and how. A field that is None leaves the choice to transformers.

    Raises ValueError, naming the flag, for values that contradict each other.
    """

    # the model and the method
    model_name_or_path: str
    adapter_name_or_path: str | None = None
    stage: Literal["sft", "pt", "dpo"] = "sft"
    finetuning_type: Literal["full", "lora", "freeze"] = "lora"
    template: str = "default"
    freeze_trainable_layers: int = 2
    freeze_trainable_modules: str = "all"
    freeze_extra_modules: str | None = None
    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_target: str = "all"
    additional_target: str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    quantization_bit: Literal[4, 8] | None = None
    pure_bf16: bool = False
    pref_beta: float = 0.1
    pref_loss: Literal["sigmoid", "hinge", "ipo", "orpo"] = "sigmoid"
    pref_ftx: float = 0.0
    use_liger_kernel: bool = False
    enable_liger_kernel: bool = False  # LLaMA-Factory's name

    # the data
    dataset: str | None = None
    eval_dataset: str | None = None
    dataset_dir: Path = Path("data")
    cutoff_len: int = 2048
    max_samples: int | None = None
    streaming: bool = False
    buffer_size: int = 16384
    group_by_length: bool = False
    train_sampling_strategy: Literal["random", "group_by_length"] | None = None
    val_size: float = 0.0
    packing: bool | None = None
    neat_packing: bool = False
    train_on_prompt: bool = False
    mask_history: bool = False
    overwrite_cache: bool = False
    preprocessing_num_workers: int | None = None
    padding_side: Literal["left", "right"] | None = None

    # the run
    output_dir: Path
    overwrite_output_dir: bool = False
    resume_from_checkpoint: str | None = None
    plot_loss: bool = False
    early_stopping_steps: int | None = None
    evaluation_strategy: Literal["no", "steps", "epoch"] | None = None
    warmup_ratio: float | None = None
    local_rank: int | None = None  # the launcher's; the environment says it too

    # transformers' TrainingArguments of the same names
    do_train: bool = False
    do_eval: bool = False
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    eval_steps: float | None = None
    eval_delay: float | None = None
    eval_on_start: bool | None = None
    per_device_train_batch_size: int | None = None
    per_device_eval_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    lr_scheduler_type: str | None = None
    lr_scheduler_kwargs: str | None = None
    warmup_steps: float | None = None
    weight_decay: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    max_grad_norm: float | None = None
    optim: str | None = None
    optim_args: str | None = None
    neftune_noise_alpha: float | None = None
    logging_strategy: Literal["no", "steps", "epoch"] | None = None
    logging_steps: float | None = None
    logging_first_step: bool | None = None
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = None
    save_steps: float | None = None
    save_total_limit: int | None = None
    save_only_model: bool | None = None
    load_best_model_at_end: bool | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    seed: int = 42
    data_seed: int | None = None
    full_determinism: bool | None = None
    bf16: bool | None = None
    fp16: bool | None = None
    tf32: bool | None = None
    use_cpu: bool | None = None
    gradient_checkpointing: bool | None = None
    torch_compile: bool | None = None
    deepspeed: str | None = None
    fsdp: str | None = None
    fsdp_config: str | None = None
    ddp_backend: str | None = None
    ddp_timeout: int | None = None
    ddp_find_unused_parameters: bool | None = None
    dataloader_num_workers: int | None = None
    dataloader_pin_memory: bool | None = None
    report_to: str | None = None
    run_name: str | None = None
    disable_tqdm: bool | None = None

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(
                f"template '{self.template}': XVERSE's own is used, under the names {' and '.join(TEMPLATES)}"
            )
        if not (self.do_train or self.do_eval):
            raise ValueError("nothing to do; give do_train, do_eval or both")
        if self.do_train and not self.dataset:
            raise ValueError("do_train needs a dataset")
        if not self.do_train and not self.dataset and not self.eval_dataset:
            raise ValueError("do_eval needs an eval_dataset, or a dataset to hold out from")
        if self.eval_strategy and self.evaluation_strategy not in (None, self.eval_strategy):
            raise ValueError("eval_strategy and evaluation_strategy are one setting and differ here")
        if self.deepspeed and self.fsdp:
            raise ValueError("deepspeed and fsdp both shard the model; give one of them")
        if self.eval_dataset and self.val_size:
            raise ValueError("val_size holds out of dataset what eval_dataset names; give one of them")
        if self.val_size < 0 or (self.val_size >= 1 and self.val_size != int(self.val_size)):
            raise ValueError(
                f"val_size {self.val_size:g} is neither a share below 1 nor a number of examples"
            )
        if self.train_on_prompt and self.mask_history:
            raise ValueError("train_on_prompt and mask_history contradict each other")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("warmup_ratio and warmup_steps are one setting; give one of them")
        if self.cutoff_len < 8 or self.lora_rank < 1 or self.freeze_trainable_layers == 0:
            raise ValueError("cutoff_len must be at least 8, lora_rank 1, freeze_trainable_layers not 0")
        if self.stage == "dpo" and self.packs:
            raise ValueError("packing is for single examples; dpo trains on pairs")
        if self.streaming:
            if self.stage == "dpo" or not self.max_steps or self.max_steps < 1:
                raise ValueError("streaming needs max_steps, as its end is not known, and stage sft or pt")
            if 0 < self.val_size < 1 or (self.wants_evaluation and not (self.val_size or self.eval_dataset)):
                raise ValueError(
                    "streaming: a share is not known; give val_size as a number, or eval_dataset"
                )
        if self.by_length and (self.packs or self.streaming):
            raise ValueError("group_by_length is for rows of one example each; packing fills rows instead")
        if self.quantization_bit and self.finetuning_type != "lora":
            raise ValueError(
                "quantization_bit: quantised weights do not learn; it needs finetuning_type lora"
            )
        if self.pref_beta <= 0:
            raise ValueError("pref_beta must be above 0")
        if self.early_stopping_steps is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_steps needs load_best_model_at_end")
        if self.evaluates == "no" and (self.load_best_model_at_end or self.early_stopping_steps):
            raise ValueError("load_best_model_at_end needs evaluation; give eval_strategy steps or epoch")

    @property
    def evaluates(self) -> str:
        """When evaluation runs during training: ``no``, ``steps`` or ``epoch``."""
        return self.eval_strategy or self.evaluation_strategy or "no"

    @property
    def by_length(self) -> bool:
        return self.group_by_length or self.train_sampling_strategy == "group_by_length"

    @property
    def wants_evaluation(self) -> bool:
        return self.do_eval or self.evaluates != "no"

    @property
    def packs(self) -> bool:
        """Whether several examples share a row; pt does unless told otherwise. Documents never see each
        other, so that ``packing`` and ``neat_packing`` are the same here."""
        return self.neat_packing or (self.stage == "pt" if self.packing is None else self.packing)

    def held_out(self, count: int) -> int:
        """How many of ``count`` examples become the validation set where none is named."""
        if self.eval_dataset or not (self.wants_evaluation or self.val_size):
            return 0
        if self.val_size >= 1:
            return min(int(self.val_size), count - 1)
        return min(max(1, math.floor(count * (self.val_size or HELD_OUT))), count - 1)


# What is ours to act on; every field from do_train on goes to transformers as it is.
_NAMES = [field.name for field in dataclasses.fields(Settings)]
OWN = frozenset(_NAMES[: _NAMES.index("do_train")])


def training_values(settings: Settings) -> dict[str, Any]:
    """The keyword arguments of transformers' TrainingArguments."""
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in OWN and getattr(settings, field.name) is not None
    }
    values["eval_strategy"] = settings.evaluates
    if settings.warmup_ratio is not None:
        values["warmup_steps"] = settings.warmup_ratio  # below 1 it is a share, since transformers 5
    values.setdefault("report_to", "none")
    return {**values, "output_dir": str(settings.output_dir)}


def read_settings(values: Mapping[str, Any], where: str) -> Settings:
    """Settings from flags or YAML. Raises UserError, naming the key, for what is unknown or wrong."""
    values = dict(values)
    for name in ("dataset", "eval_dataset", "lora_target", "report_to"):  # YAML may write lists
        if isinstance(values.get(name), list):
            values[name] = ",".join(map(str, values[name]))
    settings = build(Settings, values, where)
    if settings.fp16 and settings.bf16:
        raise UserError(f"{where}: bf16 and fp16 contradict each other; give one of them")
    return settings
