"""Every option of ``generate``, compared with stock Llama on the same weights in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

PAIR = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 1, "eos_token_id": 3}
SAMPLED = {"do_sample": True, "top_k": 0}
BEAMS = {"num_beams": 3}
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
STATIC = {"cache_implementation": "static"}

# The options with which each field of GenerationConfig is tried.
FIELDS: dict[str, list[dict[str, Any]]] = {
    "max_length": [{"max_length": 14, "max_new_tokens": None}],
    "max_new_tokens": [{"max_new_tokens": 3}, {"max_new_tokens": 0}],
    "min_length": [{"min_length": 12, "eos_token_id": list(range(3, 300))}],
    "min_new_tokens": [{"min_new_tokens": 4, "eos_token_id": list(range(3, 300))}],
    "early_stopping": [{**BEAMS, "early_stopping": value} for value in (True, "never", "sometimes")],
    "max_time": [{"max_time": 60.0}, {"max_time": 1e-9, "max_new_tokens": 50}],
    "stop_strings": [{"stop_strings": ["e", "n"], "max_new_tokens": 30}],
    "do_sample": [SAMPLED],
    "num_beams": [BEAMS, {**BEAMS, **SAMPLED}],
    "use_mtp": [{"use_mtp": True}],
    "use_cache": [{"use_cache": False}, {"use_cache": False, **BEAMS}],
    "cache_implementation": [
        {"cache_implementation": name}
        for name in ("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "quantized", "no")
    ],
    "cache_config": [{**STATIC, "cache_config": {"max_cache_len": 64}}],
    "max_cache_len": [{**STATIC, "max_cache_len": 64}],
    "temperature": [{**SAMPLED, "temperature": 0.7}, {**SAMPLED, "temperature": 0.0}],
    "top_k": [{**SAMPLED, "top_k": 5}],
    "top_p": [{**SAMPLED, "top_p": 0.6}],
    "min_p": [{**SAMPLED, "min_p": 0.2}],
    "top_h": [{**SAMPLED, "top_h": 0.4}],
    "typical_p": [{**SAMPLED, "typical_p": 0.5}],
    "epsilon_cutoff": [{**SAMPLED, "epsilon_cutoff": 0.05}],
    "eta_cutoff": [{**SAMPLED, "eta_cutoff": 0.05}],
    "repetition_penalty": [{"repetition_penalty": 1.3}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.5}],
    "length_penalty": [{**BEAMS, "length_penalty": 2.0}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 1}],
    "bad_words_ids": [{"bad_words_ids": [[40], [41, 42]]}],
    "renormalize_logits": [{**BEAMS, "renormalize_logits": True, "repetition_penalty": 1.2}],
    "forced_bos_token_id": [{"forced_bos_token_id": 2}],
    "forced_eos_token_id": [{"forced_eos_token_id": 3}],
    "remove_invalid_values": [{"remove_invalid_values": True}],
    "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (2, 5.0)}],
    "suppress_tokens": [{"suppress_tokens": list(range(4, 350))}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": list(range(4, 350))}],
    "sequence_bias": [{"sequence_bias": [[[40], 50.0], [[41, 42], -50.0]]}],
    "token_healing": [{"token_healing": True}],
    "guidance_scale": [{"guidance_scale": 1.5}],
    "watermarking_config": [{**SAMPLED, "watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}}],
    "num_return_sequences": [{**SAMPLED, "num_return_sequences": 2}, {**BEAMS, "num_return_sequences": 2}],
    "output_attentions": [{**ALL, "output_attentions": True}, {**ALL, **BEAMS, "output_attentions": True}],
    "output_hidden_states": [{**ALL, "output_hidden_states": True}],
    "output_scores": [{**ALL, **BEAMS}],
    "output_logits": [ALL],
    "return_dict_in_generate": [{"return_dict_in_generate": True}],
    "pad_token_id": [{"pad_token_id": 5, "eos_token_id": list(range(3, 300))}],
    "bos_token_id": [{"bos_token_id": 4}],
    "eos_token_id": [{"eos_token_id": list(range(3, 300))}],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 1}],
    "decoder_start_token_id": [{"decoder_start_token_id": 4}],
    "is_assistant": [{"is_assistant": True}],
    "num_assistant_tokens": [{"assistant": True, "num_assistant_tokens": 3}],
    "num_assistant_tokens_schedule": [
        {"assistant": True, "num_assistant_tokens_schedule": name} for name in ("heuristic", "constant")
    ],
    "assistant_confidence_threshold": [{"assistant": True, "assistant_confidence_threshold": 0.2}],
    "prompt_lookup_num_tokens": [{"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 3, **SAMPLED}],
    "max_matching_ngram_size": [{"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}],
    "assistant_early_exit": [{"assistant_early_exit": 1}],
    "assistant_lookbehind": [{"assistant": True, "assistant_lookbehind": 4}],
    "target_lookbehind": [{"assistant": True, "target_lookbehind": 4}],
    "assistant_ensemble_weight": [{"assistant": True, **SAMPLED, "assistant_ensemble_weight": 0.5}],
    "speculation_type": [{"speculation_type": "dflash"}],
    "compile_config": [{**STATIC, "compile_config": CompileConfig(fullgraph=True)}],
    "disable_compile": [{**STATIC, "disable_compile": True}],
    "continuous_batching_config": [{"continuous_batching_config": None}],
    "low_memory": [{"low_memory": True, **BEAMS}],
    "penalty_alpha": [{"penalty_alpha": 0.6, "top_k": 4}],
    "dola_layers": [{"dola_layers": "low"}],
    "diversity_penalty": [{**BEAMS, "num_beam_groups": 3, "diversity_penalty": 0.5}],
    "num_beam_groups": [{"num_beams": 4, "num_beam_groups": 2}],
    "constraints": [{**BEAMS, "constraints": []}],
    "force_words_ids": [{**BEAMS, "force_words_ids": [[40]]}],
    "prefill_chunk_size": [{"prefill_chunk_size": 3}],
}
BATCHED = {"prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"}  # take one row only


@pytest.fixture(scope="module")
def drafts(pair: Any) -> tuple[Any, Any]:
    """Draft models that are sometimes wrong, one of each class."""
    import copy

    models = tuple(copy.deepcopy(model) for model in pair["sdpa"])
    for model in models:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return models


def rows(count: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(4, 700, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 1
    return {"input_ids": ids[-count:], "attention_mask": mask[-count:]}


def flat(value: Any) -> Iterator[Any]:
    """The tensors and None in nested outputs, in order; a cache counts as its length."""
    if isinstance(value, (tuple, list)):
        yield f"{len(value)} items"
        for item in value:
            yield from flat(item)
    elif hasattr(value, "get_seq_length"):
        yield f"{type(value).__name__} {int(value.get_seq_length())}"
    else:
        yield value


def outcome(model: Any, arguments: dict[str, Any]) -> tuple[str, list[Any]]:
    torch.manual_seed(0)
    try:
        result = model.generate(**arguments)
    except Exception:
        return "refuses", []
    if isinstance(result, Tensor):
        return "returns", [result]
    return ", ".join(result.keys()), list(flat(list(result.values())))


def assert_same(ours: tuple[str, list[Any]], theirs: tuple[str, list[Any]]) -> None:
    assert ours[0] == theirs[0]
    assert len(ours[1]) == len(theirs[1])
    for one, other in zip(ours[1], theirs[1], strict=True):
        if isinstance(other, Tensor) and other.is_floating_point():
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        elif isinstance(other, Tensor):
            assert one.tolist() == other.tolist()
        else:
            assert one == other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", [name for name in vars(GenerationConfig()) if name[0] != "_"])
def test_each_field_as_with_llama(field: str, pair: Any, drafts: Any, hf_tokenizer: Any) -> None:
    if field == "transformers_version":
        return
    if field not in FIELDS:
        pytest.skip(f"no options to try {field}, which this version of transformers has added")
    for options in FIELDS[field]:
        attention = "eager" if "output_attentions" in options else "sdpa"
        draft = options.get("assistant", False)
        results = []
        for model, assistant in zip(pair[attention], drafts, strict=True):
            arguments = {**rows(1 if draft or field in BATCHED else 2), **PAIR, **options}
            arguments.pop("assistant", None)
            if draft:
                arguments["assistant_model"] = assistant
            if draft and "behind" in field:
                arguments |= {"tokenizer": hf_tokenizer, "assistant_tokenizer": hf_tokenizer}
            if field in ("stop_strings", "token_healing"):
                arguments["tokenizer"] = hf_tokenizer
            results.append(outcome(model, arguments))
        assert_same(*results)
