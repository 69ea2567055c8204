"""Keys that are not settings: LLaMA-Factory's and transformers', accepted where they cannot change the
result and otherwise refused, all at once, each with what to use instead; and those of earlier recipes.

Other names of settings are in ``settings.ALIASES``. The names were taken from LLaMA-Factory's
``hparams`` (2023 to 2026) and transformers' TrainingArguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xverse.config import UserError

# Keys that no value of which changes the finished model, by the reason.
_WITHOUT_EFFECT = {
    "code in model directories is never run": "trust_remote_code",
    "each model has one tokenizer, and special tokens that occur in texts stay text": (
        "use_fast_tokenizer split_special_tokens"
    ),
    "weights are memory-mapped": "low_cpu_mem_usage offload_folder",
    "the device determines the kernels": "flash_attn attn_implementation use_v1_kernels use_unsloth",
    "gradient_checkpointing decides, without reentry": (
        "use_reentrant_gc use_unsloth_gc gradient_checkpointing_kwargs activation_checkpointing_kwargs"
    ),
    "norms and losses are computed in float32": "upcast_layernorm upcast_lmhead_output",
    "only text is trained": (
        "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
        "freeze_multi_modal_projector image_resolution video_resolution"
    ),
    "the model has no experts": "moe_aux_loss_coef",
    "nothing is generated during training": (
        "infer_backend infer_dtype use_kv_cache use_cache vllm_maxlen vllm_gpu_util vllm_enforce_eager "
        "vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config "
        "sglang_lora_backend kt_maxlen kt_use_cuda_graph kt_mode kt_force_think do_sample temperature top_p "
        "top_k num_beams max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens "
        "generation_max_length generation_num_beams eval_num_beams generation_config"
    ),
    "4-bit and 8-bit weights have one format here": (
        "double_quantization quantization_type quantization_device_map bnb_4bit_quant_type"
    ),
    "examples are encoded by all cores": "preprocessing_batch_size",
    "each dataset's loss is reported": "eval_on_each_dataset",
    "it only changes the log": (
        "print_param_status include_effective_tokens_per_second include_num_input_tokens_seen "
        "include_tokens_per_second log_level log_level_replica log_on_each_node logging_dir "
        "logging_nan_inf_filter skip_memory_metrics debug project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "the launcher and the loader of batches handle it": (
        "fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context "
        "dataloader_in_order remove_unused_columns label_names length_column_name prediction_loss_only "
        "save_safetensors save_on_each_node eval_accumulation_steps eval_do_concat_batches "
        "eval_use_gather_object average_tokens_across_devices half_precision_backend ddp_broadcast_buffers "
        "ddp_bucket_cap_mb ddp_static_graph torch_empty_cache_steps liger_kernel_config fp16_opt_level "
        "use_legacy_prediction_loop bf16_full_eval fp16_full_eval torch_compile_backend torch_compile_mode "
        "restore_callback_states_from_checkpoint enable_jit_checkpoint hub_token hub_private_repo "
        "hub_strategy hub_always_push hub_revision placement_strategy ray_init_kwargs ray_storage_path "
        "ray_storage_filesystem ray_run_name resources_per_worker"
    ),
}
WITHOUT_EFFECT = {key: reason for reason, keys in _WITHOUT_EFFECT.items() for key in keys.split()}


@dataclass(frozen=True)
class Refusal:
    """``keys`` request something that is not supported, unless their value is None, false or ``harmless``.

    ``options`` belong to the keys: refused with them, and without effect otherwise. ``inverted``: false
    requests it.
    """

    keys: str
    advice: str
    harmless: tuple[Any, ...] = ()
    options: str = ""
    inverted: bool = False


_MEMORY = "finetuning_type lora or pure_bf16 save memory as well"
_EXPORT = "export with xverse export --model M [--adapter A] --format hf --out DIR"
_CHAT = "generate with xverse chat or xverse eval"
_PRETRAIN = "use xverse pretrain, which has these layouts"
REFUSALS = (
    Refusal(
        "use_galore",
        f"GaLore is not implemented; {_MEMORY}",
        options="galore_target galore_rank galore_update_interval galore_scale "
        "galore_proj_type galore_layerwise",
    ),
    Refusal(
        "use_apollo",
        f"APOLLO is not implemented; {_MEMORY}",
        options="apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
        "apollo_scale_type apollo_layerwise apollo_scale_front",
    ),
    Refusal(
        "use_badam",
        "BAdam is not implemented; finetuning_type freeze or lora train a part of the weights",
        options="badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio "
        "badam_mask_mode badam_verbose",
    ),
    Refusal("use_adam_mini", f"Adam-mini is not implemented; {_MEMORY}"),
    Refusal(
        "oft_rank oft_block_size oft_target module_dropout",
        "OFT adapters are not implemented; use finetuning_type lora",
    ),
    Refusal(
        "pissa_init",
        "PiSSA is not implemented; use_rslora and loraplus_lr_ratio speed up learning as well",
        options="pissa_iter pissa_convert",
    ),
    Refusal("create_new_adapter", f"merge the first adapter into its base: {_EXPORT}"),
    Refusal("adapter_folder", "give the adapter's whole path in adapter_name_or_path"),
    Refusal("shift_attn", "LongLoRA's shifted attention is not implemented; remove it"),
    Refusal("mixture_of_depths", "mixture of depths is not implemented; remove it"),
    Refusal("use_llama_pro", "expanded blocks are not implemented; use finetuning_type freeze without it"),
    Refusal(
        "use_dft_loss use_eaft_loss use_asft_loss",
        "this loss is not implemented; without it the loss is cross-entropy",
        options="eaft_alpha asft_alpha",
    ),
    Refusal("label_smoothing_factor", "the loss is cross-entropy without smoothing; remove it", (0, 0.0)),
    Refusal("pref_bco_weight", "the BCO term is not implemented; remove it", (0, 0.0)),
    Refusal("ld_alpha", "LD-DPO is not implemented; remove it"),
    Refusal("ref_model_adapters", f"merge the adapter into ref_model: {_EXPORT}"),
    Refusal("ref_model_quantization_bit", "quantise ref_model with xverse quantize"),
    Refusal(
        "reward_model",
        "PPO is not implemented; stages dpo and kto need no reward model",
        options="reward_model_adapters reward_model_quantization_bit reward_model_type "
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ppo_logger",
    ),
    Refusal(
        "use_swanlab",
        "use report_to tensorboard or wandb",
        options="swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
        "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
    ),
    Refusal(
        "fp8",
        "fine-tuning computes in bf16, fp16 or float32; xverse pretrain has FP8",
        options="fp8_backend fp8_enable_fsdp_float8_all_gather",
    ),
    Refusal(
        "use_kt",
        "KTransformers is not used; quantization_bit 4 saves memory",
        options="kt_optimize_rule cpu_infer chunk_size mode",
    ),
    Refusal("use_mca", _PRETRAIN),
    Refusal(
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size "
        "context_parallel_size virtual_pipeline_model_parallel_size",
        _PRETRAIN,
        (1,),
    ),
    Refusal(
        "sequence_parallel bias_activation_fusion apply_rope_fusion use_distributed_optimizer "
        "overlap_param_gather overlap_grad_reduce moe_grouped_gemm moe_token_dispatcher_type "
        "recompute_granularity parallelism_config",
        _PRETRAIN,
    ),
    Refusal("ray_num_workers", "launch with torchrun --nproc-per-node N instead of Ray", (1,)),
    Refusal("quantization_method", "quantization_bit has one method; remove it", ("bnb", "bitsandbytes")),
    Refusal("train_from_scratch", "train a new model with xverse pretrain"),
    Refusal(
        "resize_vocab add_tokens add_special_tokens new_special_tokens_config",
        "the vocabulary cannot grow; train a tokenizer with xverse tokenizer train before pretraining",
        options="init_special_tokens",
    ),
    Refusal("rope_scaling", "set rope_scaling in the model's config.json"),
    Refusal("model_revision", "download this revision and give its folder", ("main",)),
    Refusal("cache_dir", "set the environment variable HF_HOME or MODELSCOPE_CACHE"),
    Refusal("hf_hub_token ms_hub_token om_hub_token", "set the environment variable HF_TOKEN or log in"),
    Refusal(
        "push_to_hub hub_model_id export_hub_model_id", "upload the finished folder with hf upload REPO DIR"
    ),
    Refusal("freeze_language_model", "only the language model is trained; remove it"),
    Refusal("compute_accuracy", "evaluation reports loss and perplexity; xverse eval measures accuracy"),
    Refusal(
        "mix_strategy", "datasets are concatenated; give each a repeat in a list of mappings", ("concat",)
    ),
    Refusal("interleave_probs", "datasets are concatenated; give each a repeat in a list of mappings"),
    Refusal("tool_format", "tools are written in the format of the model's template; remove it"),
    Refusal(
        "tokenized_path cache_path",
        "nothing is preprocessed: examples are encoded when a run starts; remove it and start the run",
    ),
    Refusal("default_system system_prompt", "write the system message into the data"),
    Refusal("enable_thinking", "thoughts in the data are text like any other; remove it", (True,)),
    Refusal("reserved_label_len max_source_length max_target_length", "only cutoff_len bounds an example"),
    Refusal("split", "set split in the dataset's entry of dataset_info.json", ("train",)),
    Refusal("do_predict predict_with_generate", _CHAT),
    Refusal("sortish_sampler", "use group_by_length"),
    Refusal(
        "export_dir",
        _EXPORT,
        options="export_size export_device export_legacy_format export_quantization_nsamples "
        "export_quantization_maxlen",
    ),
    Refusal("export_quantization_bit export_quantization_dataset", "quantise with xverse quantize"),
    Refusal("ignore_pad_token_for_loss", "padding never has loss; remove it", (True,), inverted=True),
    Refusal("auto_find_batch_size", "the predicted memory shows what fits; remove it"),
    Refusal(
        "dataloader_drop_last ignore_data_skip", "each example is used once per epoch, also after resuming"
    ),
    Refusal("optim_target_modules", "use lora_target or freeze_trainable_modules"),
    Refusal("accelerator_config include_for_metrics batch_eval_metrics", "not supported; remove it"),
)
# Values of settings that LLaMA-Factory has and this project does not.
VALUES = {
    ("stage", "rm"): "reward models are not trained here; stages dpo and kto need none",
    ("stage", "ppo"): "PPO is not implemented; use stage dpo or kto",
    ("finetuning_type", "oft"): "OFT adapters are not implemented; use finetuning_type lora",
    ("pref_loss", "kto_pair"): "use stage kto, or pref_loss sigmoid",
}


def foreign_keys() -> list[str]:
    """All keys that are known without being settings, for the command line."""
    refused = [key for item in REFUSALS for key in (*item.keys.split(), *item.options.split())]
    return [*WITHOUT_EFFECT, *refused]


def take_foreign(values: dict[str, Any], known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Remove the keys of this module from ``values``, except ``known`` ones.

    Returns what is accepted without effect, with reasons, and what is not supported, each with what to use.
    """
    known = set(known)
    taken: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for key in [key for key in values if key in WITHOUT_EFFECT and key not in known]:
        taken.setdefault(WITHOUT_EFFECT[key], []).append(key)
        del values[key]
    for item in REFUSALS:
        keys, options = (
            [key for key in names.split() if key in values and key not in known]
            for names in (item.keys, item.options)
        )
        active = [key for key in keys if _requests(values[key], item)]
        if active:
            refused.setdefault(item.advice, []).extend([*active, *options])
        elif keys or options:
            taken.setdefault("nothing is requested", []).extend([*keys, *options])
        for key in (*keys, *options):
            del values[key]
    for (key, value), advice in VALUES.items():
        if values.get(key) == value:
            refused.setdefault(advice, []).append(f"{key} {value}")
    return _listed(taken), _listed(refused)


def _listed(keys_by_reason: Mapping[str, list[str]]) -> list[str]:
    return [f"{', '.join(keys)} ({reason})" for reason, keys in keys_by_reason.items()]


def _requests(value: Any, item: Refusal) -> bool:
    if str(value).lower() in ("", "none", "null"):
        return False
    if str(value).lower() in ("true", "false") and not item.harmless:
        return str(value).lower() == "true"
    if item.inverted:
        return str(value).lower() == "false"
    return not any(str(value).lower() == str(harmless).lower() for harmless in (*item.harmless, False))


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


def refuse_former_recipe(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for the keys of recipes before all recipes had these settings."""
    train = values.get("train")
    keys = [key for key in values if key in FORMER_KEYS]
    keys += [f"train.{key}" for key in train] if isinstance(train, Mapping) else []
    if keys:
        changes = ", ".join(f"{key} → {FORMER_KEYS.get(key, 'remove it')}" for key in keys)
        more = "" if "do_train" in values else "; add do_train: true and finetuning_type: full"
        raise UserError(
            f"{where}: the keys of fine-tuning recipes have changed: {changes}{more} "
            "(recipes/nano/sft.yaml is an example)"
        )
