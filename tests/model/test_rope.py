"""Rope scaling against transformers' Llama with the same weights, within the trained context and beyond."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from xverse.engine import Engine, Request, SamplingParams
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM
from xverse.model.rope import rope_tables
from xverse.model.scaling import RopeScaling

TRAINED = 64
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn, all of it": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 1.3,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
    },
}


@pytest.fixture(params=SCALINGS)
def scaled(request: pytest.FixtureRequest, tiny_model: Any) -> XverseForCausalLM:
    """The tiny model, as though it had been trained with a context of 64."""
    values = {**tiny_model.config.to_json(), "max_position_embeddings": TRAINED}
    config = XverseConfig.from_json({**values, "rope_scaling": SCALINGS[request.param]})
    model = XverseForCausalLM(config).eval()
    model.load_state_dict(tiny_model.state_dict())
    return model


@pytest.fixture
def llama(scaled: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from xverse.formats.write import llama_config

    found = LlamaForCausalLM(LlamaConfig(**llama_config(scaled.config, torch.float32))).eval()
    found.load_state_dict(scaled.state_dict())
    return found


@pytest.mark.parametrize("length", [5, TRAINED, TRAINED + 1, 100, 128])
def test_logits_are_llamas(scaled: Any, llama: Any, length: int) -> None:
    ids = torch.randint(4, 200, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        torch.testing.assert_close(scaled(ids, FullCausal(2, length)), llama(ids).logits, rtol=0, atol=1e-5)


def test_transformers_class_scales_as_well(scaled: Any, tmp_path: Any) -> None:
    from xverse.hf import XverseConfig as HfConfig
    from xverse.hf import XverseForCausalLM as HfModel

    model = HfModel(HfConfig.from_model_config(scaled.config)).eval()
    model.load_state_dict(scaled.state_dict())
    ids = torch.randint(4, 200, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = scaled(ids, FullCausal(1, 100))
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = HfModel.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
    assert again.config.to_model_config() == scaled.config


def test_config_reads_back(scaled: Any) -> None:
    assert XverseConfig.from_json(scaled.config.to_json()) == scaled.config
    newer = scaled.config.to_json()
    newer["rope_parameters"] = {**newer.pop("rope_scaling"), "rope_theta": newer.pop("rope_theta")}
    assert XverseConfig.from_json(newer) == scaled.config
    factor = scaled.config.rope_scaling.factor
    assert scaled.config.context_length == TRAINED * factor


def test_without_scaling_nothing_is_written(tiny_config: Any) -> None:
    assert "rope_scaling" not in tiny_config.to_json()
    assert tiny_config.context_length == tiny_config.max_position_embeddings


@pytest.mark.parametrize("chunk", [7, 512])
def test_the_engine_reaches_the_longer_context(scaled: Any, tiny_tokenizer: Any, chunk: int) -> None:
    """Greedy tokens equal those of a full forward pass; with "dynamic", of one of the longest length that the
    request may reach, however its prompt is cut and whatever the prefix cache holds."""
    with torch.no_grad():
        for parameter in scaled.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    engine = Engine(scaled, tiny_tokenizer, prefill_chunk=chunk)
    prompt = [(7 * n) % 200 + 4 for n in range(90)]
    for new_tokens in (20, 30, 20):
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(new_tokens):
                context = FullCausal(1, len(ids))
                context.rope_lengths = torch.tensor([[len(prompt) + new_tokens]])  # type: ignore[attr-defined]
                ids.append(int(scaled(torch.tensor([ids]), context)[0, -1].argmax()))
        request = Request(prompt_ids=prompt, sampling=SamplingParams.greedy(new_tokens), stop_ids=())
        assert [event.token_id for event in engine.stream(request)] == ids[len(prompt) :]


def test_dynamic_scaling_begins_beyond_the_trained_context(tiny_config: Any) -> None:
    config = dataclasses.replace(
        tiny_config,
        max_position_embeddings=TRAINED,
        rope_scaling=RopeScaling(rope_type="dynamic", factor=4.0),
    )
    positions = torch.arange(TRAINED)[None]
    plain = rope_tables(positions, dataclasses.replace(config, rope_scaling=None))
    for one, other in zip(rope_tables(positions, config), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    longer = rope_tables(positions, config, torch.tensor([[2 * TRAINED]]))
    assert not torch.allclose(longer[0], plain[0], atol=1e-3)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"rope_type": "linear", "factor": 0.5}, "factor 0.5"),
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast 1.0"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "attention_factor 0.0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        RopeScaling(**values)
