"""``model.chat``: prompts, defaults, streams, stops."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from xverse.config import UserError
from xverse.engine.sampling_params import PARAMS, SamplingParams

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello <|endoftext|> you"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "▁你是谁？"},
]


@pytest.fixture
def scripted(hf_model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with its logits replaced so that it generates given ids; everything else is real."""
    forward = hf_model.forward
    state: dict[str, Any] = {"prompts": []}

    def say(ids: list[int]) -> Any:
        def scripted_forward(*args: Any, **options: Any) -> Any:
            output = forward(*args, **options)
            seen = output.past_key_values.get_seq_length()
            if options["input_ids"].shape[1] > 1:
                state["start"] = seen
                state["prompts"].append(options["input_ids"][0].tolist())
            output.logits = torch.full_like(output.logits, -1e4)
            output.logits[..., ids[min(seen - state["start"], len(ids) - 1)]] = 1e4
            return output

        monkeypatch.setattr(hf_model, "forward", scripted_forward)
        return hf_model

    say.prompts = state["prompts"]  # type: ignore[attr-defined]
    return say


def config(**values: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(**{"eos_token_id": 3, "pad_token_id": 1, "do_sample": False, **values})


def test_prompt_is_encode_chat_and_messages_stay(
    scripted: Any, hf_tokenizer: Any, tiny_tokenizer: Any
) -> None:
    from xverse.tokenizer import encode_chat

    model = scripted([*tiny_tokenizer.encode("I am"), 3])
    before = copy.deepcopy(MESSAGES)
    assert model.chat(hf_tokenizer, MESSAGES) == "I am"
    assert before == MESSAGES
    assert scripted.prompts == [encode_chat(tiny_tokenizer, MESSAGES, max_new_tokens=8).ids]


@pytest.mark.parametrize("text", ["d<|endoftext|", "ends with t", "你好，世界！", "😀 𝄞 ok", "  \n "])
def test_reply_keeps_every_character_before_the_end(
    scripted: Any, hf_tokenizer: Any, tiny_tokenizer: Any, text: str
) -> None:
    model = scripted([*tiny_tokenizer.encode(text), 3])
    long = config(max_new_tokens=60)
    assert model.chat(hf_tokenizer, MESSAGES, generation_config=long) == text
    deltas = list(model.chat(hf_tokenizer, MESSAGES, stream=True, generation_config=long))
    assert "".join(deltas) == text
    assert all(deltas)
    assert not any("�" in delta for delta in deltas)


def test_unfinished_character_and_length_limit(scripted: Any, hf_tokenizer: Any, tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.encode("a😀")
    assert len(ids) > 3  # the emoji is several byte tokens
    model = scripted(ids)
    short = config(max_new_tokens=len(ids) - 1)
    whole = model.chat(hf_tokenizer, MESSAGES, generation_config=short)
    assert whole.endswith("�")
    assert "".join(model.chat(hf_tokenizer, MESSAGES, stream=True, generation_config=short)) == whole


def test_stream_equals_whole_reply(hf_model: Any, hf_tokenizer: Any) -> None:
    options = config(max_new_tokens=30)
    stream = hf_model.chat(hf_tokenizer, MESSAGES, stream=True, generation_config=options)
    assert isinstance(stream, Iterator)
    assert "".join(stream) == hf_model.chat(hf_tokenizer, MESSAGES, generation_config=options)
    with pytest.raises(ValueError, match="beam search"):
        list(hf_model.chat(hf_tokenizer, MESSAGES, True, config(num_beams=2, max_new_tokens=4)))


def test_closing_the_stream_stops_the_generation(hf_model: Any, hf_tokenizer: Any) -> None:
    steps = []
    hook = hf_model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    stream = hf_model.chat(
        hf_tokenizer, MESSAGES, True, config(max_new_tokens=100_000, eos_token_id=699, min_new_tokens=99_000)
    )
    next(stream)
    stream.close()
    hook.remove()
    assert len(steps) < 5_000
    assert not any(thread.name == "xverse-chat" for thread in threading.enumerate())


def test_settings_come_from_the_caller_the_model_or_upstream(
    hf_model: Any, hf_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GenerationConfig

    from xverse.hf import model_chat

    seen: list[Any] = []

    def generate(inputs: Tensor, generation_config: Any, **options: Any) -> Tensor:
        seen.append(generation_config)
        return inputs

    monkeypatch.setattr(hf_model, "generate", generate)
    hf_model.chat(hf_tokenizer, MESSAGES)
    assert (seen[-1].max_new_tokens, seen[-1].top_k) == (8, 30)
    hf_model.chat(hf_tokenizer, MESSAGES, generation_config=GenerationConfig(do_sample=False))
    assert (seen[-1].do_sample, seen[-1].max_new_tokens, seen[-1].eos_token_id) == (False, 2048, 3)
    hf_model.generation_config = GenerationConfig(pad_token_id=1, eos_token_id=3)
    hf_model.chat(hf_tokenizer, MESSAGES)
    assert {key: getattr(seen[-1], key) for key in model_chat.DEFAULTS} == model_chat.DEFAULTS
    assert hf_model.generation_config.do_sample is None  # the model's config is not changed


@pytest.mark.parametrize("name", [name for name in PARAMS if name not in ("seed", "logit_bias")])
def test_every_sampling_parameter_reaches_generate(
    name: str, hf_model: Any, hf_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GenerationConfig

    seen: dict[str, Any] = {}

    def generate(inputs: Tensor, **options: Any) -> Tensor:
        seen.update(options)
        return inputs

    monkeypatch.setattr(hf_model, "generate", generate)
    value = {"stop": ["END"], "max_new_tokens": 7, "top_k": 7}.get(name, 0.5)
    config = GenerationConfig(**{PARAMS[name].stored: value})
    hf_model.chat(hf_tokenizer, MESSAGES, generation_config=config)
    assert getattr(seen["generation_config"], PARAMS[name].stored) == value
    assert len(seen["logits_processor"]) == ("ence_penalty" in name or "ency_penalty" in name)


def test_penalties_equal_the_engine() -> None:
    from transformers import GenerationConfig

    from xverse.engine.sampling import Adjustment, adjust_
    from xverse.hf.model_chat import _penalties

    config = GenerationConfig(presence_penalty=0.5, frequency_penalty=0.25)
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    prompt, reply = [4, 5], [6, 6, 7]
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    adjustment = Adjustment(sampling, prompt)
    for token in reply:
        adjustment.add(token)
    expected = logits.clone()
    adjust_(expected, sampling, [adjustment])
    (processor,) = _penalties(config, len(prompt))
    assert torch.allclose(processor(torch.tensor([prompt + reply]), logits), expected)


def test_long_conversation_loses_old_rounds_with_a_warning(scripted: Any, hf_tokenizer: Any) -> None:
    model = scripted([3])
    model.config.max_position_embeddings = 128
    turns = []
    for number in range(10):
        turns.append({"role": "user", "content": f"question {number}"})
        turns.append({"role": "assistant", "content": f"answer {number}"})
    turns.append({"role": "user", "content": "last"})
    with pytest.warns(UserWarning, match="oldest [0-9]+ round") as record:
        assert model.chat(hf_tokenizer, turns) == ""
    assert record[0].filename == __file__
    assert len(scripted.prompts[-1]) <= 120
    with pytest.warns(UserWarning, match="cut"):
        model.chat(hf_tokenizer, [{"role": "user", "content": "long " * 400}])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.chat(hf_tokenizer, turns[-1:])


def test_what_it_accepts(hf_model: Any, hf_tokenizer: Any, tiny_tokenizer: Any) -> None:
    options = config(max_new_tokens=5)
    expected = hf_model.chat(hf_tokenizer, MESSAGES, generation_config=options)
    assert hf_model.chat(tiny_tokenizer, MESSAGES, generation_config=options) == expected
    for stream in (False, True):  # wrong messages are refused at once, not at the first delta
        with pytest.raises(UserError, match="role"):
            hf_model.chat(hf_tokenizer, [{"role": "nobody", "content": "?"}], stream=stream)
    with pytest.raises(UserError, match="AutoTokenizer"):
        hf_model.chat("nonsense", MESSAGES)
