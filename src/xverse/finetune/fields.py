"""The fields of ``Settings``: what decides a run, what ``stage: grpo`` adds, and transformers' own.

Names, order, types, defaults and help texts of the flags, of a recipe's keys and of the table in
docs/finetuning.md are those of these fields. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from xverse.values import CHAT_FORMATS, MODEL_HELP

Moment = Literal["no", "steps", "epoch"]
Dtype = Literal["bfloat16", "float16", "float32"]
TEMPLATES = ("default", "xverse", *CHAT_FORMATS)
TEMPLATE = f"chat format: default, the model's own; if it has none: {', '.join(TEMPLATES[1:])}"


@dataclass(frozen=True, kw_only=True)
class DatasetUse:
    """How a run uses one dataset: an item of ``dataset`` that a recipe writes as a mapping."""

    name: Annotated[str, "name in dataset_info.json, file, folder or hub id"]
    repeat: Annotated[int, "how often each training example occurs in an epoch"] = 1
    num_samples: Annotated[int | None, "at most this many examples of each file, drawn by seed"] = None
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


@dataclass(frozen=True, kw_only=True)
class Task:
    """The model, the method, the data and the folder of a run."""

    # the model and the method
    model_name_or_path: Annotated[str, f"base model: {MODEL_HELP}"]
    adapter_name_or_path: Annotated[str | None, "adapter to continue training"] = None
    stage: Annotated[
        Literal["sft", "pt", "dpo", "kto", "rm", "grpo"],
        "what to train on: dialogues, text, preference pairs, replies tagged as good or bad, pairs for a "
        "reward model, the model's own replies by their rewards",
    ] = "sft"
    finetuning_type: Annotated[
        Literal["full", "lora", "freeze"], "train all weights, an adapter, or some layers"
    ] = "lora"
    template: Annotated[str, TEMPLATE] = "default"
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
    quantization_aware: Annotated[
        Literal["int4", "int8"] | None,
        "round the layers' weights to this type in every forward pass; the rounded model is written, too",
    ] = None
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
    ref_model: Annotated[str | None, "with dpo, kto and grpo: reference model; unset: the base"] = None
    center_rewards_coefficient: Annotated[
        float | None, "with rm: weight of the squared sum of a pair's rewards, which centres them at 0"
    ] = None
    teacher: Annotated[str | None, "with sft and pt: model whose probabilities to learn (distillation)"] = (
        None
    )
    teacher_quantization_bit: Annotated[Literal[4, 8] | None, "quantise the teacher while loading it"] = None
    distillation_weight: Annotated[
        float, "with teacher: weight of the divergence in the loss; the rest is the weight of cross-entropy"
    ] = 1.0
    distillation_beta: Annotated[
        float, "with teacher: 0 is forward KL, 1 reverse KL, between them generalised Jensen-Shannon"
    ] = 0.0
    distillation_temperature: Annotated[float, "with teacher: divides the logits of both models"] = 1.0
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
    output_dir: Annotated[Path, "folder of the run and of the finished model, a path or URL"]
    overwrite_output_dir: Annotated[bool, "start over in a folder that holds another run"] = False
    resume_from_checkpoint: Annotated[str | None, "checkpoint to resume from; unset: the last one"] = None
    plot_loss: Annotated[bool, "draw loss.png"] = False
    early_stopping_steps: Annotated[int | None, "stop after N evaluations without a better loss"] = None
    save_dtype: Annotated[Dtype | None, "finished weights' type; unset: the base's"] = None
    generation: Annotated[
        dict[str, Any], "values for the finished model's generation_config.json, such as top_k=30"
    ] = field(default_factory=dict)
    local_rank: Annotated[int | None, "set by launchers of several processes"] = None


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What ``stage: grpo`` adds, with the names of trl's GRPOConfig."""

    reward_funcs: Annotated[
        str,
        "with grpo: rules (check, number, exact, format, program, language, finished, brevity), folders of "
        "reward models or module:function, separated by commas",
    ] = "check"
    reward_weights: Annotated[str | None, "weights of reward_funcs, separated by commas; unset: 1 each"] = (
        None
    )
    reward_pattern: Annotated[str | None, "regular expression that the rule format matches on replies"] = None
    allow_code: Annotated[
        bool, "command line only: run programs in replies (in a sandbox) and module:function"
    ] = False
    num_generations: Annotated[int, "with grpo: replies to each prompt"] = 8
    max_completion_length: Annotated[int, "with grpo: largest number of tokens of a reply"] = 512
    temperature: Annotated[float, "with grpo: divides the logits, in generation and in the loss"] = 1.0
    top_p: Annotated[float, "with grpo: draw from the most probable tokens that reach this sum"] = 1.0
    top_k: Annotated[int, "with grpo: draw from this number of most probable tokens; 0: all"] = 0
    min_p: Annotated[float, "with grpo: omit tokens below this share of the highest probability"] = 0.0
    repetition_penalty: Annotated[float, "with grpo: penalty of repeated tokens in generation; 1: off"] = 1.0
    beta: Annotated[float, "with grpo: weight of the KL divergence from the reference; 0: no reference"] = 0.0
    num_iterations: Annotated[int, "with grpo: optimizer steps on the same replies"] = 1
    epsilon: Annotated[float, "with grpo: clip probability ratios below 1 - epsilon"] = 0.2
    epsilon_high: Annotated[float | None, "with grpo: clip them above 1 + this; unset: epsilon"] = None
    delta: Annotated[float | None, "with grpo: upper bound of ratios where the advantage is negative"] = None
    importance_sampling_level: Annotated[
        Literal["token", "sequence"], "with grpo: ratios of tokens, or of whole replies (GSPO)"
    ] = "token"
    importance_sampling_mode: Annotated[
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None,
        "with grpo: correct for the difference between generation's and training's probabilities",
    ] = None
    importance_sampling_clip_max: Annotated[float, "with importance_sampling_mode: the largest ratio"] = 3.0
    importance_sampling_clip_min: Annotated[float, "with importance_sampling_mode: the smallest ratio"] = 0.0
    loss_type: Annotated[
        Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"], "with grpo: how tokens are weighted, as in trl"
    ] = "dapo"
    scale_rewards: Annotated[
        Literal["group", "batch", "none"], "with grpo: divide advantages by the deviation of these rewards"
    ] = "group"
    mask_truncated_completions: Annotated[bool, "with grpo: no loss on replies that were cut off"] = False


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """transformers' TrainingArguments of the same names; None leaves the value to them."""

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
