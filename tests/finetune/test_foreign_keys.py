"""Every key of LLaMA-Factory and transformers is a setting, without effect, or refused with advice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from xverse.cli import main, verb_parser
from xverse.config import UserError
from xverse.finetune.foreign_keys import ALIASES, REFUSALS, VALUES, WITHOUT_EFFECT, foreign_keys
from xverse.finetune.settings import DERIVED, Settings, read_settings

MINIMUM = {"model_name_or_path": "nano", "dataset": "x", "do_train": True, "output_dir": "out"}
# The fields of LLaMA-Factory's hparams in 2025 and 2026, then older names.
_THEIRS = """
model_name_or_path adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab
split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens
model_revision low_cpu_mem_usage rope_scaling flash_attn shift_attn mixture_of_depths use_unsloth
use_unsloth_gc enable_liger_kernel moe_aux_loss_coef disable_gradient_checkpointing use_reentrant_gc
upcast_layernorm upcast_lmhead_output train_from_scratch infer_backend offload_folder use_kv_cache
use_v1_kernels infer_dtype hf_hub_token ms_hub_token om_hub_token print_param_status trust_remote_code
quantization_method quantization_bit quantization_type double_quantization quantization_device_map fp8
fp8_backend fp8_enable_fsdp_float8_all_gather image_max_pixels image_min_pixels image_do_pan_and_scan
crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video
audio_sampling_rate export_dir export_size export_device export_quantization_bit
export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format
export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config
sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend use_kt kt_optimize_rule
cpu_infer chunk_size mode kt_maxlen kt_use_cuda_graph kt_mode kt_force_think
template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt mask_history streaming
buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size
preprocessing_num_workers max_samples eval_num_beams ignore_pad_token_for_loss val_size
eval_on_each_dataset packing neat_packing tool_format default_system enable_thinking tokenized_path
freeze_trainable_layers freeze_trainable_modules freeze_extra_modules additional_target lora_alpha
lora_dropout lora_rank lora_target loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init
pissa_iter pissa_convert create_new_adapter module_dropout oft_rank oft_block_size oft_target pref_beta
pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma
ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters
ref_model_quantization_bit reward_model reward_model_adapters reward_model_quantization_bit
reward_model_type ld_alpha use_galore galore_target galore_rank galore_update_interval galore_scale
galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale
apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode
badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose
use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir
swanlab_lark_webhook_url swanlab_lark_secret pure_bf16 stage finetuning_type use_llama_pro use_adam_mini
use_mca use_muon use_dft_loss use_eaft_loss use_asft_loss freeze_vision_tower freeze_multi_modal_projector
freeze_language_model compute_accuracy disable_shuffling early_stopping_steps plot_loss
include_effective_tokens_per_second do_sample temperature top_p top_k num_beams max_length max_new_tokens
repetition_penalty length_penalty skip_special_tokens ray_run_name ray_storage_path ray_storage_filesystem
ray_num_workers resources_per_worker placement_strategy ray_init_kwargs overwrite_output_dir
sortish_sampler predict_with_generate generation_max_length generation_num_beams generation_config
num_layer_trainable name_module_trainable checkpoint_dir dpo_beta dpo_loss dpo_ftx lora_lr_ratio ppo_logger
train_last_turn_only sft_packing cache_path reserved_label_len split max_source_length max_target_length
dev_ratio system_prompt orpo_beta kto_beta kto_ftx evaluation_strategy warmup_ratio group_by_length
train_sampling_strategy logging_dir save_safetensors half_precision_backend fp16_opt_level
use_legacy_prediction_loop hf_auth_token use_auth_token resume_lora_training neft_alpha lora_bf16_mode
ref_model_checkpoint reward_model_checkpoint disable_version_checking prompt_template source_prefix
data_shared_file_system adafactor past_index jit_mode_eval use_ipex no_cuda use_mps_device
include_inputs_for_metrics xpu_backend tpu_num_cores sharded_ddp mp_parameters torchdynamo ray_scope
"""
THEIRS = _THEIRS.split()


def known() -> set[str]:
    fields = {field.name for field in dataclasses.fields(Settings)}
    return {*fields, *ALIASES, *DERIVED, *foreign_keys()}


def test_every_key_of_theirs_is_known() -> None:
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert {*THEIRS, *theirs} - known() == set()


def test_no_key_has_two_meanings() -> None:
    names = [*(field.name for field in dataclasses.fields(Settings)), *ALIASES, *DERIVED, *foreign_keys()]
    assert sorted(names) == sorted(set(names))


def test_keys_without_effect_are_accepted_and_reported_once(capsys: Any) -> None:
    values = {**MINIMUM, **dict.fromkeys(WITHOUT_EFFECT, True), "galore_rank": 128, "mix_strategy": "concat"}
    assert read_settings(values, "lf.yaml", quiet=False) == read_settings(MINIMUM, "lf.yaml")
    text = capsys.readouterr().err
    for key in WITHOUT_EFFECT:
        assert text.count(f"{key},") + text.count(f"{key} (") >= 1, key
    assert text.count("accepted without effect") == 1
    assert "trust_remote_code (code in model directories is never run)" in text


@pytest.mark.parametrize("item", REFUSALS, ids=lambda item: item.keys.split()[0])
def test_refused_keys_are_harmless_while_they_request_nothing(item: Any) -> None:
    keys, options = item.keys.split(), item.options.split()
    for key in keys:
        for value in (None, item.inverted, str(item.inverted).lower(), *item.harmless):
            read_settings({**MINIMUM, key: value, **dict.fromkeys(options, 8)}, "lf.yaml")
        with pytest.raises(UserError) as caught:
            read_settings({**MINIMUM, key: not item.inverted, **dict.fromkeys(options, 8)}, "lf.yaml") if (
                not item.harmless or item.inverted
            ) else read_settings({**MINIMUM, key: "other", **dict.fromkeys(options, 8)}, "lf.yaml")
        message = str(caught.value)
        assert item.advice in message
        assert "\n" not in message
        for name in (key, *options):
            assert name in message


def test_all_unsupported_and_unknown_keys_are_named_together() -> None:
    values = {"use_galore": True, "galore_rank": 128, "stage": "ppo", "tool_format": "llama3", "lora_rnak": 8}
    with pytest.raises(UserError) as caught:
        read_settings({**MINIMUM, **values, "zebra": 1, "dataset": [{"name": "a", "repaet": 2}]}, "lf.yaml")
    message = str(caught.value)
    for part in (
        "use_galore, galore_rank (GaLore",
        "stage ppo (",
        "tool_format (",
        "did you mean 'lora_rank'",
    ):
        assert part in message
    assert "'zebra'" in message
    assert "dataset.0.repaet" in message


@pytest.mark.parametrize(("setting", "advice"), VALUES.items())
def test_values_of_theirs_are_refused_with_advice(setting: tuple[str, str], advice: str) -> None:
    with pytest.raises(UserError) as caught:
        read_settings({**MINIMUM, setting[0]: setting[1]}, "lf.yaml")
    assert advice in str(caught.value)


def test_other_names_and_lists_are_taken_with_effect() -> None:
    values = {
        "num_layer_trainable": 3,
        "finetuning_type": "freeze",
        "name_module_trainable": ["q_proj", "v_proj"],
        "dev_ratio": 0.1,
        "disable_gradient_checkpointing": True,
        "train_sampling_strategy": "sequential",
        "resume_from_checkpoint": False,
    }
    settings = read_settings({**MINIMUM, **values}, "lf.yaml")
    assert (settings.freeze_trainable_layers, settings.freeze_trainable_modules) == (3, "q_proj,v_proj")
    assert settings.val_size == 0.1
    assert settings.gradient_checkpointing is False
    assert settings.disable_shuffling
    assert settings.resume_from_checkpoint is None


def test_flags_are_the_same_keys(tmp_path: Any, capsys: Any) -> None:
    words = ["--trust_remote_code", "true", "--flash_attn", "fa2", "--use_fast_tokenizer", "--do_train"]
    given = vars(verb_parser("finetune").parse_args(words))
    assert given["trust_remote_code"] is True
    assert given["use_fast_tokenizer"] is True
    file = tmp_path / "lf.yaml"
    file.write_text(yaml.safe_dump({**MINIMUM, "trust_remote_code": True, "model_name_or_path": "nowhere"}))
    assert main(["finetune", str(file)]) == 2
    error = capsys.readouterr().err
    assert "no model 'nowhere'" in error
    assert main(["finetune", "--use_galore", "--galore_rank", "8", "--do_train"]) == 2
    assert "use_galore, galore_rank" in capsys.readouterr().err
