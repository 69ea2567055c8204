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
from typing import Annotated, Any, Literal

from xverse.config import UserError, build, unknown_keys, unknown_text
from xverse.finetune.foreign_keys import refuse_former_recipe, take_foreign
from xverse.log import notice
from xverse.values import CHAT_FORMATS

TEMPLATES = ("default", "xverse", *CHAT_FORMATS)
_TEMPLATE = f"chat format: default, the model's own; if it has none: {', '.join(TEMPLATES[1:])}"
HELD_OUT = 0.01  # share held out for evaluation without val_size and eval_dataset
Moment = Literal["no", "steps", "epoch"]
Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DatasetUse:
    """How a run uses one dataset: an item of ``dataset`` that a recipe writes as a mapping."""

    name: Annotated[str, "name in dataset_info.json, file, folder or hub id"]
    repeat: Annotated[int, "how often each training example occurs in an epoch"] = 1
    num_samples: Annotated[int | None, "most examples of each file, drawn at random by seed"] = None
    max_reply_tokens: Annotated[int | None, "drop dialogues with longer replies, on average"] = None

    def __post_init__(self) -> None:
        for name in ("repeat", "num_samples", "max_reply_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")


Datasets = tuple[DatasetUse, ...]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Pretraining text among the training examples, in which all its languages have equal shares."""

    data: Annotated[Path, "folder that data prepare wrote, or a file or folder of texts"]
    share: Annotated[float, "share of the training tokens, below 1; 0: only compare languages"]
    eval_tokens: Annotated[int, "held-out tokens of each language that are compared"] = 8192

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"replay.share {self.share:g} is out of range (0 to below 1)")
        if self.eval_tokens < 0:
            raise ValueError("replay.eval_tokens must be at least 0")


_TINY, _MOST = math.ulp(0.0), 2.0**62
_RANGES = {
    "lora_rank per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "max_samples buffer_size early_stopping_steps ddp_timeout": (1, _MOST, "at least 1"),
    "cutoff_len": (8, _MOST, "at least 8"),
    "max_steps": (-1, _MOST, "at least 1; -1: unset"),
    "num_train_epochs eval_steps logging_steps save_steps lora_alpha pref_beta loraplus_lr_ratio": (
        _TINY,
        _MOST,
        "above 0",
    ),
    "learning_rate weight_decay warmup_steps val_size eval_delay adam_epsilon max_grad_norm pref_ftx "
    "neftune_noise_alpha dataloader_num_workers simpo_gamma kto_chosen_weight kto_rejected_weight "
    "loraplus_lr_embedding": (0, _MOST, "at least 0"),
    "dpo_label_smoothing": (0, 0.5 - 2**-54, "from 0 to below 0.5"),
    "lora_dropout adam_beta1 adam_beta2": (0, 1 - 2**-53, "from 0 to below 1"),
    "max_bad_share": (0, 1, "0 to 1"),
    "seed data_seed": (0, 2**32 - 1, "0 to 4294967295"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train on what, and how. For a field that is None, transformers chooses the value.

    Raises ValueError, naming the setting, for values that contradict each other.
    """

    URLS = ("model_name_or_path",)

    # the model and the method
    model_name_or_path: Annotated[str, "base model: a directory, a hub id or nano"]
    adapter_name_or_path: Annotated[str | None, "adapter to continue training"] = None
    stage: Annotated[
        Literal["sft", "pt", "dpo", "kto"],
        "what to train on: dialogues, text, preference pairs, replies tagged as good or bad",
    ] = "sft"
    finetuning_type: Annotated[
        Literal["full", "lora", "freeze"], "train all weights, an adapter, or some layers"
    ] = "lora"
    template: Annotated[str, _TEMPLATE] = "default"
    freeze_trainable_layers: Annotated[int, "with freeze: train the last N layers; -N: the first ones"] = 2
    freeze_trainable_modules: Annotated[str, "with freeze: modules to train in these layers, or all"] = "all"
    freeze_extra_modules: Annotated[str | None, "with freeze: other modules to train"] = None
    lora_rank: Annotated[int, "rank of the adapter"] = 8
    lora_alpha: Annotated[float | None, "scale of the adapter; unset: twice the rank"] = None
    lora_dropout: Annotated[float, "dropout on the adapter's input"] = 0.0
    lora_target: Annotated[str, "modules that get an adapter, separated by commas, or all"] = "all"
    additional_target: Annotated[str | None, "with lora: modules to train whole, such as lm_head"] = None
    use_rslora: Annotated[bool, "scale the adapter by 1/sqrt(rank)"] = False
    use_dora: Annotated[bool, "train a DoRA adapter"] = False
    loraplus_lr_ratio: Annotated[
        float | None, "with lora: learning rate of the second matrices over that of the first ones (LoRA+)"
    ] = None
    loraplus_lr_embedding: Annotated[float, "with loraplus_lr_ratio: learning rate of embeddings"] = 1e-6
    use_muon: Annotated[bool, "with full or freeze: Muon for matrices, AdamW for the rest"] = False
    quantization_bit: Annotated[Literal[4, 8] | None, "quantise the base while loading it (QLoRA)"] = None
    pure_bf16: Annotated[bool, "keep weights and optimizer state in bfloat16, without float32 copies"] = False
    pref_beta: Annotated[float, "with dpo and kto: strength of the preference term"] = 0.1
    pref_loss: Annotated[
        Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"],
        "with dpo: the loss; sigmoid is DPO's, orpo and simpo need no reference model",
    ] = "sigmoid"
    pref_ftx: Annotated[float, "with dpo and kto: weight of the supervised loss on the good reply"] = 0.0
    dpo_label_smoothing: Annotated[float, "with sigmoid: share of pairs that may be swapped (cDPO)"] = 0.0
    simpo_gamma: Annotated[float, "with simpo: the margin between the replies' rewards"] = 0.5
    kto_chosen_weight: Annotated[float, "with kto: weight of good replies"] = 1.0
    kto_rejected_weight: Annotated[float, "with kto: weight of bad replies"] = 1.0
    ref_model: Annotated[str | None, "with dpo and kto: reference model; unset: the base"] = None
    use_liger_kernel: Annotated[bool, "compute norms and activations with Liger's kernels (CUDA)"] = False

    # the data
    dataset: Annotated[Datasets, "names in dataset_info.json, files, folders or hub ids"] = ()
    eval_dataset: Annotated[Datasets, "datasets to evaluate on, written like dataset"] = ()
    dataset_dir: Annotated[Path, "folder of dataset_info.json and its files"] = Path("data")
    replay: Annotated[
        Replay | None, "pretraining text to mix in, so that no language is forgotten: data=FOLDER share=0.2"
    ] = None
    identity: Annotated[
        dict[str, str], "values for {{placeholders}} in the data, such as name=… author=…"
    ] = field(default_factory=dict)
    keep_placeholders: Annotated[bool, "keep other {{placeholders}} as plain text"] = False
    cutoff_len: Annotated[int, "longest example, and longest packed row, in tokens"] = 2048
    max_samples: Annotated[int | None, "use only the first N usable examples of each dataset"] = None
    max_bad_share: Annotated[float, "stop if more than this share of a dataset's items is unusable"] = 0.05
    streaming: Annotated[bool, "read the data while training; needs max_steps"] = False
    buffer_size: Annotated[int, "with streaming: examples shuffled at a time"] = 16384
    group_by_length: Annotated[bool, "put rows of similar length into one step"] = False
    val_size: Annotated[float, "examples of dataset to hold out: a share below 1, or a number"] = 0.0
    packing: Annotated[bool | None, "fill rows with several isolated examples; unset: with stage pt"] = None
    disable_shuffling: Annotated[bool, "take the examples in the order of the files"] = False
    train_on_prompt: Annotated[bool, "compute the loss on prompts, too"] = False
    mask_history: Annotated[bool, "compute the loss on the last reply only"] = False
    overwrite_cache: Annotated[bool, "accepted without effect: nothing is cached"] = False
    preprocessing_num_workers: Annotated[int | None, "accepted without effect: all cores are used"] = None
    padding_side: Annotated[Literal["left", "right"] | None, "saved with the tokenizer; not used"] = None

    # the run
    output_dir: Annotated[Path, "folder of the run and of the finished model"]
    overwrite_output_dir: Annotated[bool, "start anew in a folder that holds another run"] = False
    resume_from_checkpoint: Annotated[str | None, "checkpoint to resume from; unset: the last one"] = None
    plot_loss: Annotated[bool, "draw loss.png"] = False
    early_stopping_steps: Annotated[int | None, "stop after N evaluations without a better loss"] = None
    save_dtype: Annotated[Dtype | None, "finished weights' type; unset: the base's"] = None
    generation: Annotated[
        dict[str, Any], "values for the finished model's generation_config.json, such as top_k=30"
    ] = field(default_factory=dict)
    local_rank: Annotated[int | None, "set by launchers of several processes"] = None

    # transformers' TrainingArguments of the same names
    do_train: Annotated[bool, "train"] = False
    do_eval: Annotated[bool, "evaluate at the end"] = False
    eval_strategy: Annotated[Moment | None, "when to evaluate during training"] = None
    eval_steps: Annotated[float | None, "steps between evaluations; a share of the run if below 1"] = None
    eval_delay: Annotated[float | None, "steps or epochs before the first evaluation"] = None
    eval_on_start: Annotated[bool | None, "evaluate before the first step"] = None
    per_device_train_batch_size: Annotated[int | None, "rows of a micro-batch on each process"] = None
    per_device_eval_batch_size: Annotated[int | None, "rows of an evaluation batch on each process"] = None
    gradient_accumulation_steps: Annotated[int | None, "micro-batches of a step"] = None
    num_train_epochs: Annotated[float | None, "passes over the dataset"] = None
    max_steps: Annotated[int | None, "optimizer steps; overrides num_train_epochs"] = None
    learning_rate: Annotated[float | None, "peak learning rate"] = None
    lr_scheduler_type: Annotated[str | None, "learning-rate schedule, such as cosine_with_min_lr"] = None
    lr_scheduler_kwargs: Annotated[str | None, 'JSON options of it, such as {"min_lr_rate": 0.02}'] = None
    warmup_steps: Annotated[float | None, "steps of linear warm-up; a share of the run if below 1"] = None
    weight_decay: Annotated[float | None, "weight decay of matrices"] = None
    adam_beta1: Annotated[float | None, "AdamW's beta1"] = None
    adam_beta2: Annotated[float | None, "AdamW's beta2"] = None
    adam_epsilon: Annotated[float | None, "AdamW's epsilon"] = None
    max_grad_norm: Annotated[float | None, "clip gradients to this norm"] = None
    optim: Annotated[str | None, "optimizer, by transformers' name"] = None
    optim_args: Annotated[str | None, "options of the optimizer"] = None
    neftune_noise_alpha: Annotated[float | None, "noise added to embeddings (NEFTune)"] = None
    logging_strategy: Annotated[Moment | None, "when to log the loss"] = None
    logging_steps: Annotated[float | None, "steps between log lines"] = None
    logging_first_step: Annotated[bool | None, "log the first step, too"] = None
    save_strategy: Annotated[Literal["no", "steps", "epoch", "best"] | None, "when to write checkpoints"] = (
        None
    )
    save_steps: Annotated[float | None, "steps between checkpoints"] = None
    save_total_limit: Annotated[int | None, "checkpoints to keep"] = None
    save_only_model: Annotated[bool | None, "save no optimizer state; prevents resuming"] = None
    load_best_model_at_end: Annotated[bool | None, "finish with the best evaluated checkpoint"] = None
    metric_for_best_model: Annotated[str | None, "metric that defines the best checkpoint"] = None
    greater_is_better: Annotated[bool | None, "whether that metric should rise"] = None
    seed: Annotated[int, "seed of initialisation, order and held-out examples"] = 42
    data_seed: Annotated[int | None, "seed of the order; unset: seed"] = None
    full_determinism: Annotated[bool | None, "use deterministic kernels only"] = None
    bf16: Annotated[bool | None, "compute in bfloat16; full fine-tuning keeps weights in float32"] = None
    fp16: Annotated[bool | None, "compute in float16 with loss scaling (CUDA)"] = None
    tf32: Annotated[bool | None, "allow TF32 matmuls (CUDA)"] = None
    use_cpu: Annotated[bool | None, "train on the CPU"] = None
    gradient_checkpointing: Annotated[bool | None, "recompute activations to save memory"] = None
    torch_compile: Annotated[bool | None, "compile the model"] = None
    deepspeed: Annotated[str | None, "DeepSpeed's JSON file; one of recipes/sft if only a name"] = None
    fsdp: Annotated[str | None, "shard the model with FSDP2, such as full_shard; needs torchrun"] = None
    fsdp_config: Annotated[str | None, "FSDP's options as JSON, or a JSON file"] = None
    ddp_backend: Annotated[str | None, "communication backend of several processes"] = None
    ddp_timeout: Annotated[int | None, "seconds after which communication fails"] = None
    ddp_find_unused_parameters: Annotated[bool | None, "let DDP find parameters without gradient"] = None
    dataloader_num_workers: Annotated[int | None, "processes that prepare batches"] = None
    dataloader_pin_memory: Annotated[bool | None, "pin batches in memory (CUDA)"] = None
    report_to: Annotated[str | None, "experiment trackers: tensorboard or wandb, separated by commas"] = None
    run_name: Annotated[str | None, "name of the run in trackers"] = None
    disable_tqdm: Annotated[bool | None, "accepted: progress is logged as lines"] = None

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_task()
        self._check_data()
        self._check_method()

    def _check_ranges(self) -> None:
        for names, (low, high, span) in _RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise ValueError(f"{name} {value:g} is out of range ({span})")

    def _check_task(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(f"template '{self.template}' is not known; {_TEMPLATE}")
        if not (self.do_train or self.do_eval):
            raise ValueError(
                "nothing to do; set do_train, do_eval or both (xverse chat --adapter A talks to the result)"
            )
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
        if self.replay and self.stage not in ("sft", "pt"):
            raise ValueError(f"replay needs stage sft or pt, not {self.stage}")
        if self.train_on_prompt and self.mask_history:
            raise ValueError("train_on_prompt and mask_history contradict each other")
        if self.group_by_length and self.disable_shuffling:
            raise ValueError("group_by_length and disable_shuffling contradict each other")
        if self.by_rows and self.packs:
            raise ValueError(f"{self.by_rows} cannot be combined with packing")
        if self.streaming:
            if self.pairs or not self.max_steps or self.max_steps < 1:
                raise ValueError("streaming needs max_steps and stage sft or pt")
            if self.group_by_length or self.disable_shuffling:
                name = "group_by_length" if self.group_by_length else "disable_shuffling"
                raise ValueError(f"{name} cannot be combined with streaming")
            if any(use.repeat > 1 for use in self.dataset):
                raise ValueError("repeat cannot be combined with streaming")
            if self.replay:
                raise ValueError("replay cannot be combined with streaming; add its text to dataset")
            if 0 < self.val_size < 1 or (self.wants_evaluation and not (self.val_size or self.eval_dataset)):
                raise ValueError(
                    "with streaming the dataset's size is unknown: set val_size to a number of examples, "
                    "or use eval_dataset"
                )

    def _check_method(self) -> None:
        if self.freeze_trainable_layers == 0:
            raise ValueError("freeze_trainable_layers must not be 0")
        if self.ref_model and not self.needs_reference:
            raise ValueError("ref_model needs stage dpo or kto, and a pref_loss with a reference model")
        if self.dpo_label_smoothing and (self.stage != "dpo" or self.pref_loss != "sigmoid"):
            raise ValueError("dpo_label_smoothing needs stage dpo and pref_loss sigmoid")
        if self.loraplus_lr_ratio is not None and self.finetuning_type != "lora":
            raise ValueError("loraplus_lr_ratio needs finetuning_type lora")
        if self.use_muon:
            others = [name for name in ("deepspeed", "optim", "pure_bf16") if getattr(self, name)]
            if self.finetuning_type == "lora" or others:
                raise ValueError(
                    f"use_muon cannot be combined with {others[0] if others else 'finetuning_type lora'}"
                )
        if self.quantization_bit and self.finetuning_type != "lora":
            raise ValueError(
                "quantization_bit needs finetuning_type lora: quantised weights cannot be trained"
            )
        if self.finetuning_type == "lora" and (self.save_dtype or self.generation):
            name = "save_dtype" if self.save_dtype else "generation"
            raise ValueError(f"{name} needs finetuning_type full or freeze: an adapter uses its base's")

    @property
    def by_rows(self) -> str:
        """The setting that needs rows of one example each, or an empty string."""
        return f"stage {self.stage}" if self.pairs else "group_by_length" if self.group_by_length else ""

    @property
    def pairs(self) -> bool:
        """Whether two neighbouring examples belong together: two replies to one prompt."""
        return self.stage in ("dpo", "kto")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with a reference model."""
        return self.stage == "kto" or (self.stage == "dpo" and self.pref_loss not in ("orpo", "simpo"))

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
    "activation_checkpointing": "gradient_checkpointing",
    "checkpoint_dir": "adapter_name_or_path",
    "dev_ratio": "val_size",
    "dpo_beta": "pref_beta",
    "dpo_ftx": "pref_ftx",
    "dpo_loss": "pref_loss",
    "enable_liger_kernel": "use_liger_kernel",
    "evaluation_strategy": "eval_strategy",
    "kto_beta": "pref_beta",
    "kto_ftx": "pref_ftx",
    "lora_lr_ratio": "loraplus_lr_ratio",
    "name_module_trainable": "freeze_trainable_modules",
    "neat_packing": "packing",
    "num_layer_trainable": "freeze_trainable_layers",
    "orpo_beta": "pref_beta",
    "sft_packing": "packing",
    "train_last_turn_only": "mask_history",
    "warmup_ratio": "warmup_steps",
}


# Settings with a meaning of their own, by other keys: see _resolve_aliases.
DERIVED = ("disable_gradient_checkpointing", "train_sampling_strategy")
_COMMA_SEPARATED = (
    "lora_target", "additional_target", "freeze_trainable_modules", "freeze_extra_modules", "report_to",
)  # fmt: skip


def training_values(settings: Settings) -> dict[str, Any]:
    """The keyword arguments of transformers' TrainingArguments."""
    values = {
        name: value for name in _NAMES if name not in OWN and (value := getattr(settings, name)) is not None
    }
    values["eval_strategy"] = settings.evaluates
    values.setdefault("report_to", "none")
    return {**values, "output_dir": str(settings.output_dir)}


def read_settings(values: Mapping[str, Any], where: str, quiet: bool = True) -> Settings:
    """Settings from flags, a recipe or both; reports keys without effect unless ``quiet``.

    Raises UserError that names all keys that are unknown or not supported, and for wrong values.
    """
    values = dict(values)
    refuse_former_recipe(values, where)
    without_effect, refused = take_foreign(values, _NAMES)
    _resolve_aliases(values, where)
    for name in ("dataset", "eval_dataset"):
        if values.get(name) is not None:
            values[name] = _dataset_uses(values[name])
        else:
            values.pop(name, None)
    for name in ("eval_strategy", "logging_strategy", "save_strategy"):
        values |= {name: "no"} if values.get(name) is False else {}  # YAML reads no as false
    for name in _COMMA_SEPARATED:
        if isinstance(values.get(name), list):
            values[name] = ",".join(map(str, values[name]))
    for name in ("lr_scheduler_kwargs", "fsdp_config"):
        if isinstance(values.get(name), Mapping):
            values[name] = json.dumps(values[name])
    if isinstance(values.get("resume_from_checkpoint"), bool):
        values["resume_from_checkpoint"] = "true" if values["resume_from_checkpoint"] else None
    unknown = unknown_keys(Settings, values)
    if refused:
        text = f"not supported: {'; '.join(refused)}"
        raise UserError(f"{where}: {text}{f'; {unknown_text(unknown)}' if unknown else ''}")
    settings = build(Settings, values, where)
    if without_effect and not quiet:
        notice(f"{where}: accepted without effect: {'; '.join(without_effect)}")
    return settings


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
        if isinstance(value, Replay):
            value = _changed(value)
        values[item.name] = str(value) if isinstance(value, Path) else value
    return values


def _plain(use: DatasetUse) -> str | dict[str, Any]:
    values = _changed(use)
    return use.name if list(values) == ["name"] else values


def _changed(part: DatasetUse | Replay) -> dict[str, Any]:
    """The values that differ from the defaults, without types that YAML lacks."""
    values = {item.name: getattr(part, item.name) for item in dataclasses.fields(part)}
    return {
        item.name: str(value) if isinstance(value := values[item.name], Path) else value
        for item in dataclasses.fields(part)
        if values[item.name] != item.default
    }


def _dataset_uses(value: Any) -> Any:
    """Names separated by commas, or a list of names and mappings, as a list of mappings."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list):
        return value
    return [{"name": item} if isinstance(item, str) else item for item in value]


def _resolve_aliases(values: dict[str, Any], where: str) -> None:
    def set_value(name: str, value: Any, alias: str) -> None:
        if values.get(name) not in (None, value):
            raise UserError(
                f"{where}: {name} and {alias} are one setting and differ here; remove one of them"
            )
        values[name] = value

    for alias, name in ALIASES.items():
        value = values.pop(alias, None)
        if value is not None and not (name == "packing" and not value):
            set_value(name, value, alias)
    disabled = values.pop("disable_gradient_checkpointing", None)
    if disabled is not None:
        set_value("gradient_checkpointing", not disabled, "disable_gradient_checkpointing")
    strategy = values.pop("train_sampling_strategy", None)
    if strategy in ("group_by_length", "random"):
        set_value("group_by_length", strategy == "group_by_length", "train_sampling_strategy")
    elif strategy == "sequential":
        set_value("disable_shuffling", True, "train_sampling_strategy")
    elif strategy is not None:
        known = "random, sequential, group_by_length"
        raise UserError(f"{where}: train_sampling_strategy: '{strategy}' is not one of {known}")
