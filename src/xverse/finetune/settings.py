"""The settings of ``xverse finetune``, with LLaMA-Factory's and transformers' names and meanings.

One frozen dataclass defines the flags, the keys of a recipe, their help texts and the table in
docs/finetuning.md. Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xverse.config import UserError, build

TEMPLATES = ("default", "xverse")
HELD_OUT = 0.01  # share held out for evaluation without val_size and eval_dataset
Moment = Literal["no", "steps", "epoch"]


def _set(help: str, default: Any = None, **kwargs: Any) -> Any:
    if not kwargs:
        kwargs["default"] = default
    return field(metadata={"help": help}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class DatasetUse:
    """How a run uses one dataset: an item of ``dataset`` that a recipe writes as a mapping."""

    name: str = _set("name in dataset_info.json, file, folder or hub id", default=dataclasses.MISSING)
    repeat: int = _set("how often each training example occurs in an epoch", 1)
    num_samples: int | None = _set("at most this many examples of each file, drawn at random by seed")
    max_reply_tokens: int | None = _set("drop dialogues whose replies have more tokens than this on average")

    def __post_init__(self) -> None:
        for name in ("repeat", "num_samples", "max_reply_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train on what, and how. For a field that is None, transformers chooses the value.

    Raises ValueError, naming the setting, for values that contradict each other.
    """

    # the model and the method
    model_name_or_path: str = _set("base model: a directory, a hub id or nano", default=dataclasses.MISSING)
    adapter_name_or_path: str | None = _set("adapter to continue training")
    stage: Literal["sft", "pt", "dpo"] = _set(
        "supervised fine-tuning, continued pretraining, or preference optimisation", "sft"
    )
    finetuning_type: Literal["full", "lora", "freeze"] = _set(
        "train all weights, an adapter, or some layers", "lora"
    )
    template: str = _set("chat format: XVERSE's, under the names default and xverse", "default")
    freeze_trainable_layers: int = _set(
        "with freeze: train the last N layers; a negative number trains the first ones", 2
    )
    freeze_trainable_modules: str = _set("with freeze: modules to train in these layers, or all", "all")
    freeze_extra_modules: str | None = _set("with freeze: modules outside the layers to train as well")
    lora_rank: int = _set("rank of the adapter", 8)
    lora_alpha: float | None = _set("scale of the adapter; unset: twice the rank")
    lora_dropout: float = _set("dropout on the adapter's input", 0.0)
    lora_target: str = _set("modules that get an adapter, separated by commas, or all", "all")
    additional_target: str | None = _set("with lora: modules to train whole, such as lm_head")
    use_rslora: bool = _set("scale the adapter by 1/sqrt(rank)", False)
    use_dora: bool = _set("train a DoRA adapter", False)
    quantization_bit: Literal[4, 8] | None = _set("quantise the base while loading it (QLoRA)")
    pure_bf16: bool = _set("keep weights and optimizer state in bfloat16, without float32 copies", False)
    pref_beta: float = _set("with dpo: strength of the preference term", 0.1)
    pref_loss: Literal["sigmoid", "hinge", "ipo", "orpo"] = _set(
        "with dpo: the loss; sigmoid is DPO's, orpo needs no reference model", "sigmoid"
    )
    pref_ftx: float = _set("with dpo: weight of the supervised loss on the chosen reply", 0.0)
    use_liger_kernel: bool = _set("compute norms and activations with Liger's kernels (CUDA)", False)

    # the data
    dataset: tuple[DatasetUse, ...] = _set(
        "names in dataset_info.json, files, folders or hub ids, separated by commas; a recipe may write a list"
        " of names and mappings",
        (),
    )
    eval_dataset: tuple[DatasetUse, ...] = _set("datasets to evaluate on, written like dataset", ())
    dataset_dir: Path = _set("folder of dataset_info.json and its files", Path("data"))
    identity: dict[str, str] = _set(
        "values for {{placeholders}} in the data, such as name=… author=…", default_factory=dict
    )
    keep_placeholders: bool = _set("accept {{placeholders}} that identity does not fill as plain text", False)
    cutoff_len: int = _set("longest example, and longest packed row, in tokens", 2048)
    max_samples: int | None = _set("use only the first N usable examples of each dataset")
    streaming: bool = _set("read the data while training instead of loading it first; needs max_steps", False)
    buffer_size: int = _set("with streaming: examples shuffled at a time", 16384)
    group_by_length: bool = _set("put rows of similar length into one step", False)
    val_size: float = _set("examples of dataset to hold out: a share below 1, or a number", 0.0)
    packing: bool | None = _set(
        "put several examples into one row, isolated from each other; unset: only with stage pt"
    )
    train_on_prompt: bool = _set("compute the loss on prompts, too", False)
    mask_history: bool = _set("compute the loss on the last reply only", False)
    overwrite_cache: bool = _set("accepted without effect: nothing is cached", False)
    preprocessing_num_workers: int | None = _set("accepted without effect: the tokenizer uses all cores")
    padding_side: Literal["left", "right"] | None = _set(
        "saved with the tokenizer; training itself does not pad"
    )

    # the run
    output_dir: Path = _set("folder of the run and of the finished model", default=dataclasses.MISSING)
    overwrite_output_dir: bool = _set("start anew in a folder that holds another run", False)
    resume_from_checkpoint: str | None = _set("checkpoint to resume from; unset: the last complete one")
    plot_loss: bool = _set("draw loss.png", False)
    early_stopping_steps: int | None = _set("stop after N evaluations without a better loss")
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = _set(
        "type of the finished weights; unset: the base's"
    )
    generation: dict[str, Any] = _set(
        "values for the finished model's generation_config.json, such as temperature=0.5",
        default_factory=dict,
    )
    local_rank: int | None = _set("set by launchers of several processes")

    # transformers' TrainingArguments of the same names
    do_train: bool = _set("train", False)
    do_eval: bool = _set("evaluate at the end", False)
    eval_strategy: Moment | None = _set("when to evaluate during training")
    eval_steps: float | None = _set("steps between evaluations; a share of the run if below 1")
    eval_delay: float | None = _set("steps or epochs before the first evaluation")
    eval_on_start: bool | None = _set("evaluate before the first step")
    per_device_train_batch_size: int | None = _set("rows of a micro-batch on each process")
    per_device_eval_batch_size: int | None = _set("rows of an evaluation batch on each process")
    gradient_accumulation_steps: int | None = _set("micro-batches of a step")
    num_train_epochs: float | None = _set("passes over the dataset")
    max_steps: int | None = _set("optimizer steps; overrides num_train_epochs")
    learning_rate: float | None = _set("peak learning rate")
    lr_scheduler_type: str | None = _set("schedule of the learning rate, such as cosine_with_min_lr")
    lr_scheduler_kwargs: str | None = _set('options of the schedule as JSON, such as {"min_lr_rate": 0.02}')
    warmup_steps: float | None = _set("steps of linear warm-up; a share of the run if below 1")
    weight_decay: float | None = _set("weight decay of matrices")
    adam_beta1: float | None = _set("AdamW's beta1")
    adam_beta2: float | None = _set("AdamW's beta2")
    adam_epsilon: float | None = _set("AdamW's epsilon")
    max_grad_norm: float | None = _set("clip gradients to this norm")
    optim: str | None = _set("optimizer, by transformers' name")
    optim_args: str | None = _set("options of the optimizer")
    neftune_noise_alpha: float | None = _set("noise added to embeddings (NEFTune)")
    logging_strategy: Moment | None = _set("when to log the loss")
    logging_steps: float | None = _set("steps between log lines")
    logging_first_step: bool | None = _set("log the first step, too")
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = _set("when to write checkpoints")
    save_steps: float | None = _set("steps between checkpoints")
    save_total_limit: int | None = _set("checkpoints to keep")
    save_only_model: bool | None = _set("write checkpoints without optimizer state; they cannot be resumed")
    load_best_model_at_end: bool | None = _set("finish with the best evaluated checkpoint")
    metric_for_best_model: str | None = _set("metric that defines the best checkpoint")
    greater_is_better: bool | None = _set("whether that metric should rise")
    seed: int = _set("seed of initialisation, order and held-out examples", 42)
    data_seed: int | None = _set("seed of the order; unset: seed")
    full_determinism: bool | None = _set("use deterministic kernels only")
    bf16: bool | None = _set("compute in bfloat16; full fine-tuning keeps weights in float32")
    fp16: bool | None = _set("compute in float16 with loss scaling (CUDA)")
    tf32: bool | None = _set("allow TF32 matmuls (CUDA)")
    use_cpu: bool | None = _set("train on the CPU")
    gradient_checkpointing: bool | None = _set("recompute activations in the backward pass to save memory")
    torch_compile: bool | None = _set("compile the model")
    deepspeed: str | None = _set("DeepSpeed's JSON file; deepspeed.json also names recipes/sft/deepspeed.json")
    fsdp: str | None = _set("shard the model with FSDP2, such as full_shard; needs torchrun")
    fsdp_config: str | None = _set("FSDP's options as JSON, or a JSON file")
    ddp_backend: str | None = _set("communication backend of several processes")
    ddp_timeout: int | None = _set("seconds after which communication fails")
    ddp_find_unused_parameters: bool | None = _set("let DDP search for parameters without gradient")
    dataloader_num_workers: int | None = _set("processes that prepare batches")
    dataloader_pin_memory: bool | None = _set("pin batches in memory (CUDA)")
    report_to: str | None = _set("experiment trackers: tensorboard or wandb, separated by commas")
    run_name: str | None = _set("name of the run in trackers")
    disable_tqdm: bool | None = _set("accepted: progress is logged as lines")

    def __post_init__(self) -> None:
        self._check_task()
        self._check_data()
        self._check_method()

    def _check_task(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(
                f"template '{self.template}': only XVERSE's is supported ({' or '.join(TEMPLATES)})"
            )
        if not (self.do_train or self.do_eval):
            raise ValueError("nothing to do; set do_train, do_eval or both")
        if self.do_train and not self.dataset:
            raise ValueError("do_train needs a dataset")
        if not self.do_train and not self.dataset and not self.eval_dataset:
            raise ValueError("do_eval needs eval_dataset, or a dataset to hold out examples from")
        if self.deepspeed and self.fsdp:
            raise ValueError("deepspeed and fsdp both shard the model; use one of them")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 contradict each other; use one of them")
        if self.early_stopping_steps is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_steps needs load_best_model_at_end")
        if self.evaluates == "no" and self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end needs evaluation; set eval_strategy to steps or epoch")

    def _check_data(self) -> None:
        if self.eval_dataset and self.val_size:
            raise ValueError("val_size and eval_dataset are mutually exclusive; use one of them")
        if self.val_size < 0 or (self.val_size >= 1 and self.val_size != int(self.val_size)):
            raise ValueError(
                f"val_size {self.val_size:g} is neither a share below 1 nor a number of examples"
            )
        if self.train_on_prompt and self.mask_history:
            raise ValueError("train_on_prompt and mask_history contradict each other")
        if self.cutoff_len < 8:
            raise ValueError("cutoff_len must be at least 8")
        if self.by_rows and self.packs:
            raise ValueError(f"{self.by_rows} cannot be combined with packing")
        if self.streaming:
            if self.stage == "dpo" or not self.max_steps or self.max_steps < 1:
                raise ValueError("streaming needs max_steps and stage sft or pt")
            if self.group_by_length:
                raise ValueError("group_by_length cannot be combined with streaming")
            if any(use.repeat > 1 for use in self.dataset):
                raise ValueError("repeat cannot be combined with streaming")
            if 0 < self.val_size < 1 or (self.wants_evaluation and not (self.val_size or self.eval_dataset)):
                raise ValueError(
                    "with streaming the dataset's size is unknown: set val_size to a number of examples, "
                    "or use eval_dataset"
                )

    def _check_method(self) -> None:
        if self.lora_rank < 1 or self.freeze_trainable_layers == 0:
            raise ValueError("lora_rank must be at least 1 and freeze_trainable_layers not 0")
        if self.quantization_bit and self.finetuning_type != "lora":
            raise ValueError("quantization_bit needs finetuning_type lora: quantised weights cannot be trained")
        if self.finetuning_type == "lora" and (self.save_dtype or self.generation):
            name = "save_dtype" if self.save_dtype else "generation"
            raise ValueError(f"{name} needs finetuning_type full or freeze: an adapter uses its base's")
        if self.pref_beta <= 0:
            raise ValueError("pref_beta must be above 0")

    @property
    def by_rows(self) -> str:
        """The setting that needs rows of one example each, or an empty string."""
        return "stage dpo" if self.stage == "dpo" else "group_by_length" if self.group_by_length else ""

    @property
    def evaluates(self) -> str:
        """When evaluation runs during training: ``no``, ``steps`` or ``epoch``."""
        return self.eval_strategy or "no"

    @property
    def wants_evaluation(self) -> bool:
        return self.do_eval or self.evaluates != "no"

    @property
    def packs(self) -> bool:
        """Whether several examples share a row; by default only in stage pt."""
        return self.stage == "pt" if self.packing is None else self.packing

    def held_out(self, count: int) -> int:
        """How many of ``count`` examples to hold out of ``dataset`` for validation."""
        if self.eval_dataset or not (self.wants_evaluation or self.val_size):
            return 0
        if self.val_size >= 1:
            return min(int(self.val_size), count - 1)
        return min(max(1, math.floor(count * (self.val_size or HELD_OUT))), count - 1)


# Fields from do_train on are passed to transformers unchanged.
_NAMES = [item.name for item in dataclasses.fields(Settings)]
OWN = frozenset(_NAMES[: _NAMES.index("do_train")])

# Other names of a setting, which LLaMA-Factory or older versions of transformers use.
ALIASES = {
    "enable_liger_kernel": "use_liger_kernel",
    "evaluation_strategy": "eval_strategy",
    "neat_packing": "packing",
    "train_sampling_strategy": "group_by_length",
    "warmup_ratio": "warmup_steps",
}


def training_values(settings: Settings) -> dict[str, Any]:
    """The keyword arguments of transformers' TrainingArguments."""
    values = {
        name: value
        for name in _NAMES
        if name not in OWN and (value := getattr(settings, name)) is not None
    }
    values["eval_strategy"] = settings.evaluates
    values.setdefault("report_to", "none")
    return {**values, "output_dir": str(settings.output_dir)}


def read_settings(values: Mapping[str, Any], where: str) -> Settings:
    """Settings from flags, a recipe or both. Raises UserError, naming the keys, for unknown or wrong ones."""
    values = dict(values)
    _refuse_former_recipe(values, where)
    _resolve_aliases(values, where)
    for name in ("dataset", "eval_dataset"):
        if values.get(name) is not None:
            values[name] = _dataset_uses(values[name])
        else:
            values.pop(name, None)
    for name in ("lora_target", "report_to"):
        if isinstance(values.get(name), list):
            values[name] = ",".join(map(str, values[name]))
    for name in ("lr_scheduler_kwargs", "fsdp_config"):
        if isinstance(values.get(name), Mapping):
            values[name] = json.dumps(values[name])
    return build(Settings, values, where)


def to_values(settings: Settings) -> dict[str, Any]:
    """Plain values, without defaults, from which ``read_settings`` makes equal settings."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        if value is None or value == default:
            continue
        if item.name in ("dataset", "eval_dataset"):
            value = [_plain(use) for use in value]
            if all(isinstance(use, str) for use in value):
                value = ",".join(value)
        values[item.name] = str(value) if isinstance(value, Path) else value
    return values


def _plain(use: DatasetUse) -> str | dict[str, Any]:
    values = {
        item.name: getattr(use, item.name)
        for item in dataclasses.fields(use)
        if getattr(use, item.name) != item.default
    }
    return use.name if list(values) == ["name"] else values


def _dataset_uses(value: Any) -> Any:
    """Names separated by commas, or a list of names and mappings, as a list of mappings."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list):
        return value
    return [{"name": item} if isinstance(item, str) else item for item in value]


def _resolve_aliases(values: dict[str, Any], where: str) -> None:
    for alias, name in ALIASES.items():
        value = values.pop(alias, None)
        if alias == "train_sampling_strategy" and value is not None:
            if value not in ("random", "group_by_length"):
                raise UserError(f"{where}: {alias}: '{value}' is not one of random, group_by_length")
            value = value == "group_by_length"
        if value is None or (alias == "neat_packing" and not value):
            continue
        if values.get(name) not in (None, value):
            raise UserError(f"{where}: {name} and {alias} are one setting and differ here; remove one of them")
        values[name] = value


FORMER_KEYS = {
    "model": "model_name_or_path",
    "out": "output_dir",
    "datasets": "dataset, a list of {name: …}",
    "sequence_length": "cutoff_len, with packing: true",
    "valid_share": "val_size",
    "train.steps": "max_steps",
    "train.batch_size": "per_device_train_batch_size",
    "train.learning_rate": "learning_rate",
    "train.warmup_steps": "warmup_steps",
    "train.final_lr_ratio": "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: …}",
    "train.weight_decay": "weight_decay",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.grad_clip": "max_grad_norm",
    "train.dtype": "bf16: true or false",
    "train.micro_batch_size": "gradient_accumulation_steps",
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.compile": "torch_compile",
    "train.checkpoint_every": "save_steps",
    "train.keep_checkpoints": "save_total_limit",
    "train.validate_every": "eval_strategy: steps, eval_steps",
    "train.log_every": "logging_steps",
    "train.trackers": "report_to",
}


def _refuse_former_recipe(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for the keys of recipes before all recipes had these settings."""
    train = values.get("train")
    keys = [key for key in values if key in FORMER_KEYS]
    keys += [f"train.{key}" for key in train] if isinstance(train, Mapping) else []
    if keys:
        changes = ", ".join(f"{key} → {FORMER_KEYS.get(key, 'remove it')}" for key in keys)
        raise UserError(
            f"{where}: the keys of fine-tuning recipes have changed: {changes}; add do_train: true and "
            "finetuning_type: full (recipes/nano/sft.yaml is an example)"
        )
