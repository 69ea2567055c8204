"""The settings of ``xverse finetune``, with LLaMA-Factory's and transformers' names and meanings.

One frozen dataclass defines the flags, the keys of a recipe, their help texts and the table in
docs/finetuning.md. Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, build, unknown_keys, unknown_text
from xverse.engine.sampling_params import SamplingParams
from xverse.finetune.fields import TEMPLATE, TEMPLATES, Arguments, DatasetUse, Replay, Rollouts, Task
from xverse.finetune.foreign_keys import ALIASES, refuse_former_recipe, take_foreign
from xverse.log import notice
from xverse.texts import parse_json, read_object

HELD_OUT = 0.01  # share held out for evaluation without val_size and eval_dataset

_TINY, _MOST = math.ulp(0.0), 2.0**62
_RANGES = {
    "lora_rank per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "max_samples buffer_size early_stopping_steps ddp_timeout max_completion_length "
    "num_iterations": (1, _MOST, "at least 1"),
    "num_generations": (2, _MOST, "at least 2"),
    "cutoff_len": (8, _MOST, "at least 8"),
    "max_steps": (-1, _MOST, "at least 1; -1: unset"),
    "num_train_epochs eval_steps logging_steps save_steps lora_alpha pref_beta loraplus_lr_ratio temperature "
    "distillation_temperature epsilon delta importance_sampling_clip_max": (_TINY, _MOST, "above 0"),
    "learning_rate weight_decay warmup_steps val_size eval_delay adam_epsilon max_grad_norm pref_ftx "
    "neftune_noise_alpha dataloader_num_workers simpo_gamma kto_chosen_weight kto_rejected_weight "
    "loraplus_lr_embedding beta epsilon_high importance_sampling_clip_min "
    "center_rewards_coefficient": (0, _MOST, "at least 0"),
    "dpo_label_smoothing": (0, 0.5 - 2**-54, "from 0 to below 0.5"),
    "lora_dropout adam_beta1 adam_beta2": (0, 1 - 2**-53, "from 0 to below 1"),
    "max_bad_share distillation_weight distillation_beta": (0, 1, "0 to 1"),
    "seed data_seed": (0, 2**32 - 1, "0 to 4294967295"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(Arguments, Rollouts, Task):
    """What to train on what, and how. For a field that is None, transformers chooses the value.

    Raises ValueError, naming the setting, for values that contradict each other.
    """

    URLS = ("model_name_or_path", "output_dir")

    def __post_init__(self) -> None:
        checks = (self._range_problems, self._task_problems, self._data_problems, self._method_problems)
        for problem in itertools.chain.from_iterable(check() for check in checks):
            raise ValueError(problem)
        self._check_options()

    def _range_problems(self) -> Iterator[str]:
        for names, (low, high, span) in _RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    yield f"{name} {value:g} is out of range ({span})"

    def _task_problems(self) -> Iterator[str]:
        if self.template not in TEMPLATES:
            yield f"template '{self.template}' is not known; {TEMPLATE}"
        if not (self.do_train or self.do_eval):
            yield "nothing to do; set do_train, do_eval or both (xverse chat --adapter A talks to the result)"
        if self.do_train and not self.dataset:
            yield "do_train needs a dataset"
        if not self.do_train and not self.dataset and not self.eval_dataset:
            yield "do_eval needs eval_dataset, or a dataset to hold out examples from"
        if self.deepspeed and self.fsdp:
            yield "deepspeed and fsdp both shard the model; use one of them"
        if self.bf16 and self.fp16:
            yield "bf16 and fp16 contradict each other; use one of them"
        if self.early_stopping_steps is not None and not self.load_best_model_at_end:
            yield "early_stopping_steps needs load_best_model_at_end"
        if self.evaluates == "no" and self.load_best_model_at_end:
            yield "load_best_model_at_end needs evaluation; set eval_strategy to steps or epoch"

    def _data_problems(self) -> Iterator[str]:
        if self.eval_dataset and self.val_size:
            yield "val_size and eval_dataset are mutually exclusive; use one of them"
        if self.val_size < 0 or (self.val_size >= 1 and self.val_size != int(self.val_size)):
            yield f"val_size {self.val_size:g} is neither a share below 1 nor a number of examples"
        for name in ("replay", "teacher"):
            if getattr(self, name) and self.stage not in ("sft", "pt"):
                yield f"{name} needs stage sft or pt, not {self.stage}"
        if self.train_on_prompt and self.mask_history:
            yield "train_on_prompt and mask_history contradict each other"
        if self.group_by_length and self.disable_shuffling:
            yield "group_by_length and disable_shuffling contradict each other"
        if self.by_rows and self.packs:
            yield f"{self.by_rows} cannot be combined with packing"
        if self.streaming:
            yield from self._streaming_problems()

    def _streaming_problems(self) -> Iterator[str]:
        if self.stage not in ("sft", "pt") or not self.max_steps or self.max_steps < 1:
            yield "streaming needs max_steps and stage sft or pt"
        for name in ("group_by_length", "disable_shuffling"):
            if getattr(self, name):
                yield f"{name} cannot be combined with streaming"
        if any(use.repeat > 1 for use in self.dataset):
            yield "repeat cannot be combined with streaming"
        if self.replay:
            yield "replay cannot be combined with streaming; add its text to dataset"
        if 0 < self.val_size < 1 or (self.wants_evaluation and not (self.val_size or self.eval_dataset)):
            yield (
                "with streaming the dataset's size is unknown: set val_size to a number of examples, or use "
                "eval_dataset"
            )

    def _method_problems(self) -> Iterator[str]:
        lora = self.finetuning_type == "lora"
        if self.freeze_trainable_layers == 0:
            yield "freeze_trainable_layers must not be 0"
        if self.ref_model and not self.needs_reference:
            yield "ref_model needs stage dpo or kto with a pref_loss that has a reference, or grpo with beta"
        if self.dpo_label_smoothing and (self.stage != "dpo" or self.pref_loss != "sigmoid"):
            yield "dpo_label_smoothing needs stage dpo and pref_loss sigmoid"
        if self.loraplus_lr_ratio is not None and not lora:
            yield "loraplus_lr_ratio needs finetuning_type lora"
        if self.use_muon:
            others = [name for name in ("deepspeed", "optim", "pure_bf16") if getattr(self, name)]
            if lora or others:
                yield f"use_muon cannot be combined with {others[0] if others else 'finetuning_type lora'}"
        if self.quantization_bit and not lora:
            yield "quantization_bit needs finetuning_type lora: quantised weights cannot be trained"
        if self.quantization_bit and self.stage == "rm":
            yield "quantization_bit cannot be combined with stage rm; use bf16 with finetuning_type lora"
        yield from self._grpo_problems()
        if not self.teacher:
            names = [name for name in _NAMES if name.startswith(("teacher_", "distillation_"))]
            yield from self._changed_without(names, "teacher")
        if self.stage != "rm":
            yield from self._changed_without(["center_rewards_coefficient"], "stage rm")
        if self.quantization_aware:
            for name in ("deepspeed", "quantization_bit", "use_dora", "lora_dropout", "additional_target"):
                if getattr(self, name):
                    yield f"quantization_aware cannot be combined with {name}"
            if self.stage == "rm":
                yield "quantization_aware cannot be combined with stage rm"
        for name in ("save_dtype", "generation"):
            if lora and getattr(self, name):
                yield f"{name} needs finetuning_type full or freeze: an adapter uses its base's"

    def _check_options(self) -> None:
        """Texts that transformers would parse when the run begins, and what the finished model keeps."""
        self.scheduler_options()
        self.fsdp_options()
        for option in split_names(self.optim_args or ""):
            if not option.partition("=")[2]:
                raise ValueError(f"optim_args: '{option}' is not name=value; separate several by commas")
        try:
            SamplingParams(**{name: value for name, value in self.generation.items() if name in _GENERATION})
        except UserError as error:
            raise ValueError(f"generation: {error}") from None

    def scheduler_options(self) -> dict[str, Any]:
        """``lr_scheduler_kwargs``. Raises UserError for anything but a JSON object."""
        return _json_object(self.lr_scheduler_kwargs or "{}", "lr_scheduler_kwargs")

    def fsdp_options(self) -> dict[str, Any]:
        """``fsdp_config``, from its text or its file. Raises UserError for anything but a JSON object."""
        text = (self.fsdp_config or "{}").strip()
        return _json_object(text, "fsdp_config") if text.startswith("{") else read_object(text)

    def _grpo_problems(self) -> Iterator[str]:
        if self.stage != "grpo":
            yield from self._changed_without(
                [item.name for item in dataclasses.fields(Rollouts)], "stage grpo"
            )
            return
        names, weights = split_names(self.reward_funcs), split_names(self.reward_weights or "")
        if not names:
            yield "stage grpo needs reward_funcs"
        if weights and len(weights) != len(names):
            yield f"reward_weights has {len(weights)} values for {len(names)} reward_funcs"
        for weight in weights:
            try:
                finite = math.isfinite(float(weight))
            except ValueError:
                finite = False
            if not finite:
                yield f"reward_weights: '{weight}' is not a finite number"
        if ("format" in names) != (self.reward_pattern is not None):
            yield "the rule format in reward_funcs and reward_pattern need each other"
        for name in names:
            if (name == "program" or (":" in name and not Path(name).exists())) and not self.allow_code:
                yield f"reward_funcs: {name} runs code; add --allow_code to the command line"
        if self.cutoff_len <= self.max_completion_length:
            yield (
                f"cutoff_len {self.cutoff_len} leaves no room for a prompt next to max_completion_length "
                f"{self.max_completion_length}"
            )
        self.sampling()
        if self.importance_sampling_mode is None:
            names = ["importance_sampling_clip_min", "importance_sampling_clip_max"]
            yield from self._changed_without(names, "importance_sampling_mode")
        rows = (self.per_device_train_batch_size or 8) * (self.gradient_accumulation_steps or 1)
        if rows % self.num_generations:
            yield (
                "per_device_train_batch_size × gradient_accumulation_steps are the replies of a process in a "
                f"step, {rows} here; they must be a multiple of num_generations {self.num_generations}"
            )

    def _changed_without(self, names: Iterable[str], needed: str) -> Iterator[str]:
        """A problem for each of these settings, which only ``needed`` uses, that is not its default."""
        for item in dataclasses.fields(self):
            if item.name in names and getattr(self, item.name) != item.default:
                yield f"{item.name} needs {needed}"

    def sampling(self) -> SamplingParams:
        """How stage grpo draws replies. Raises UserError for a value out of range."""
        drawn = {name: getattr(self, name) for name in _GENERATION}
        return SamplingParams(max_new_tokens=self.max_completion_length, **drawn)

    @property
    def by_rows(self) -> str:
        """The setting that needs rows of one example each, or an empty string."""
        grouped = self.pairs or self.stage == "grpo"
        return f"stage {self.stage}" if grouped else "group_by_length" if self.group_by_length else ""

    @property
    def pairs(self) -> bool:
        """Whether two neighbouring examples belong together: two replies to one prompt."""
        return self.stage in ("dpo", "kto", "rm")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with a reference model."""
        if self.stage == "dpo":
            return self.pref_loss not in ("orpo", "simpo")
        return self.stage == "kto" or (self.stage == "grpo" and self.beta > 0)

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
            if self.val_size >= count:
                raise UserError(f"val_size {self.val_size:g} leaves none of {count:,} examples to train on")
            return int(self.val_size)
        return min(max(1, math.floor(count * (self.val_size or HELD_OUT))), count - 1)


# Fields from do_train on are passed to transformers unchanged.
_NAMES = [item.name for item in dataclasses.fields(Settings)]
OWN = frozenset(_NAMES[: _NAMES.index("do_train")])

# What only some runs use, by what they need; in others it is accepted without effect.
_ONLY_WITH: dict[str, tuple[str, Callable[[Settings], bool]]] = {
    "finetuning_type freeze": (
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules",
        lambda settings: settings.finetuning_type == "freeze",
    ),
    "finetuning_type lora and a new adapter": (
        "lora_rank lora_alpha lora_dropout lora_target additional_target use_rslora use_dora",
        lambda settings: settings.finetuning_type == "lora" and not settings.adapter_name_or_path,
    ),
    "loraplus_lr_ratio": ("loraplus_lr_embedding", lambda settings: settings.loraplus_lr_ratio is not None),
    "stage dpo or kto": ("pref_beta pref_ftx", lambda settings: settings.stage in ("dpo", "kto")),
    "stage dpo": ("pref_loss", lambda settings: settings.stage == "dpo"),
    "pref_loss simpo": ("simpo_gamma", lambda settings: settings.pref_loss == "simpo"),
    "stage kto": ("kto_chosen_weight kto_rejected_weight", lambda settings: settings.stage == "kto"),
    "streaming": ("buffer_size", lambda settings: settings.streaming),
    "load_best_model_at_end": (
        "metric_for_best_model greater_is_better",
        lambda settings: settings.load_best_model_at_end or settings.save_strategy == "best",
    ),
    "fsdp": ("fsdp_config", lambda settings: bool(settings.fsdp)),
    "eval_strategy steps or epoch": ("eval_steps eval_delay", lambda settings: settings.evaluates != "no"),
}

# Settings with a meaning of their own, by other keys: see _resolve_aliases.
DERIVED = ("disable_gradient_checkpointing", "train_sampling_strategy")
_GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of LLaMA-Factory, too
_COMMA_SEPARATED = (
    "lora_target", "additional_target", "freeze_trainable_modules", "freeze_extra_modules", "report_to",
    "reward_funcs", "reward_weights",
)  # fmt: skip


def _json_object(text: str, where: str) -> dict[str, Any]:
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise UserError(f'{where}: expected a JSON object, such as {{"key": 1}}, found {text}')
    return values


def split_names(text: str) -> list[str]:
    """The names in ``text``, which commas separate."""
    return [name for part in text.split(",") if (name := part.strip())]


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
    if values.get("stage") != "grpo":
        given = [name for name in _GENERATION if values.pop(name, None) is not None]
        without_effect += [f"{', '.join(given)} (nothing is generated during training)"] if given else []
    if isinstance(values.get("scale_rewards"), bool):  # trl's former type
        values["scale_rewards"] = "group" if values["scale_rewards"] else "none"
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
    defaults = {item.name: item.default for item in dataclasses.fields(settings)}
    for needed, (names, applies) in _ONLY_WITH.items():
        given = [name for name in names.split() if getattr(settings, name) != defaults[name]]
        if given and not applies(settings):
            without_effect.append(f"{', '.join(given)} (only used with {needed})")
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
    return {
        item.name: str(value) if isinstance(value, Path) else value
        for item in dataclasses.fields(part)
        if (value := getattr(part, item.name)) != item.default
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
        if alias == "warmup_ratio" and isinstance(value, (int, float)) and value >= 1:
            raise UserError(
                f"{where}: warmup_ratio {value:g} is not a share below 1; warmup_steps counts steps"
            )
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
