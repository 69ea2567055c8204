"""The transformers model compared with stock Llama on the same weights, and transformers' tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TOLERANCE = 1e-4


def tokens(batch: int, length: int, vocab: int = 700, seed: int = 1) -> Tensor:
    return torch.randint(4, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((torch.ones(width - len(row), dtype=torch.long), row)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def test_full_pass_equals_llama(hf_model: Any, llama: Any) -> None:
    ids = tokens(3, 40)
    assert difference(hf_model(ids).logits, llama(ids).logits) < TOLERANCE
    positions = torch.arange(8100, 8140)[None]  # beyond 8,000, one row for all
    a = hf_model(ids, position_ids=positions).logits
    assert difference(a, llama(ids, position_ids=positions).logits) < TOLERANCE


@torch.no_grad()
def test_token_by_token_with_cache_equals_llama(hf_model: Any, llama: Any) -> None:
    ids = tokens(2, 20)
    whole = llama(ids).logits
    cache = None
    for start, end in [(0, 7), (7, 8), (8, 9), (9, 14), (14, 20)]:  # one at a time and in chunks
        output = hf_model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        assert difference(output.logits, whole[:, start:end]) < TOLERANCE
    assert cache is not None
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_left_padded_batch_equals_llama_and_each_row_alone(hf_model: Any, llama: Any) -> None:
    rows = [tokens(1, 15, seed=2)[0], tokens(1, 6, seed=3)[0], tokens(1, 11, seed=4)[0]]
    batch = left_padded(rows)
    logits = hf_model(**batch).logits
    other = llama(**batch).logits
    assert torch.isfinite(logits).all()
    for index, row in enumerate(rows):
        assert difference(logits[index, -len(row) :], other[index, -len(row) :]) < TOLERANCE
        assert difference(logits[index, -len(row) :], llama(row[None]).logits[0]) < TOLERANCE


@torch.no_grad()
def test_static_cache(hf_model: Any, llama: Any) -> None:
    from transformers import StaticCache

    rows = [tokens(1, 9, seed=2)[0], tokens(1, 5, seed=3)[0]]
    batch = left_padded(rows)
    cache = StaticCache(config=hf_model.config, max_cache_len=16)
    first = hf_model(**batch, past_key_values=cache, use_cache=True).logits
    more = tokens(2, 1, seed=5)
    mask = torch.cat((batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
    second = hf_model(more, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    for index, row in enumerate(rows):
        alone = llama(torch.cat((row, more[index]))[None]).logits[0]
        assert difference(first[index, -len(row) :], alone[:-1]) < TOLERANCE
        assert difference(second[index, -1], alone[-1]) < TOLERANCE


@torch.no_grad()
def test_packed_positions_keep_documents_apart(hf_model: Any) -> None:
    a, b = tokens(1, 7, seed=2), tokens(1, 5, seed=3)
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    packed = hf_model(torch.cat((a, b), 1), position_ids=positions, use_cache=False).logits
    assert difference(packed[:, :7], hf_model(a).logits) < TOLERANCE
    assert difference(packed[:, 7:], hf_model(b).logits) < TOLERANCE


@torch.no_grad()
def test_other_inputs_and_outputs(hf_model: Any, llama: Any) -> None:
    ids = tokens(2, 10)
    whole = hf_model(ids).logits
    embeddings = hf_model.get_input_embeddings()(ids)
    assert torch.equal(hf_model(inputs_embeds=embeddings).logits, whole)
    assert difference(hf_model(ids, logits_to_keep=2).logits, whole[:, -2:]) < TOLERANCE
    assert difference(hf_model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]]) < TOLERANCE
    assert torch.equal(hf_model(ids, token_type_ids=torch.zeros_like(ids)).logits, whole)
    ours = hf_model(ids, output_hidden_states=True).hidden_states
    theirs = llama(ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    assert all(difference(x, y) < TOLERANCE for x, y in zip(ours, theirs, strict=True))
    assert torch.equal(hf_model(ids, return_dict=False)[0], whole)
    assert hf_model(ids, use_cache=False).past_key_values is None


def test_wrong_arguments_are_named(hf_model: Any) -> None:
    ids = tokens(1, 4)
    with pytest.raises(TypeError, match="atention_mask"):
        hf_model(ids, atention_mask=ids)
    with pytest.raises(ValueError, match="attention_mask is"):
        hf_model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="exactly one"):
        hf_model()


def test_loss_and_gradients_equal_llama_without_logits(hf_model: Any, llama: Any) -> None:
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    hf_model.train()
    output = hf_model(ids, labels=labels, skip_logits=True)
    assert output.logits is None
    output.loss.backward()
    other = llama(ids, labels=labels)
    other.loss.backward()
    assert abs(output.loss.item() - other.loss.item()) < 1e-5
    theirs = dict(llama.named_parameters())
    for name, parameter in hf_model.named_parameters():
        assert difference(parameter.grad, theirs[name].grad) < 1e-4, name
    assert hf_model(ids, labels=labels).logits.shape == (2, 12, 700)
    hf_model.eval()
    assert hf_model(ids, labels=labels).logits.shape == (2, 12, 700)
    summed = hf_model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss.item()
    assert abs(summed - llama(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss.item()) < 1e-5
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert abs(hf_model(ids, shift_labels=shifted).loss.item() - output.loss.item()) < 1e-5


def test_loss_goes_through_a_changed_head(hf_model: Any) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    ids = tokens(1, 8)
    plain = hf_model(ids, labels=ids).loss
    head = hf_model.lm_head
    hf_model.lm_head = Scaled(64, 700, bias=False)
    hf_model.lm_head.weight = head.weight
    assert abs(hf_model(ids, labels=ids).loss - plain) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(hf_model: Any, reentrant: bool) -> None:
    ids = tokens(2, 12)
    hf_model.train()
    hf_model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in hf_model.named_parameters()}
    hf_model.zero_grad()
    calls = []
    hf_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    hook = hf_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    hf_model(ids, labels=ids, use_cache=True).loss.backward()
    hook.remove()
    assert len(calls) == 2  # once, and once more in the backward pass
    for name, parameter in hf_model.named_parameters():
        assert difference(parameter.grad, expected[name]) < 1e-6, name


def test_greedy_and_beams_equal_llama(hf_model: Any, llama: Any) -> None:
    batch = left_padded([tokens(1, 9, seed=2)[0], tokens(1, 5, seed=3)[0]])
    common = {**batch, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": 3}
    common["repetition_penalty"] = 1.0
    for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"repetition_penalty": 1.3}):
        ours = hf_model.generate(**{**common, **options})
        assert torch.equal(ours, llama.generate(**{**common, **options})), options
    assert torch.equal(
        hf_model.generate(**common, cache_implementation="static"), hf_model.generate(**common)
    )


def test_sampling_follows_the_seed_and_token_type_ids_do_not_disturb(hf_model: Any) -> None:
    ids = tokens(1, 6)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    options = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.92, "max_new_tokens": 10}
    replies = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        replies.append(hf_model.generate(**inputs, **options).tolist())
    assert replies[0] == replies[1] != replies[2]


def test_assisted_generation_equals_greedy(hf_model: Any, written: Path) -> None:
    from transformers import AutoModelForCausalLM

    assistant = AutoModelForCausalLM.from_pretrained(written)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)  # a draft model that is sometimes wrong
    ids = tokens(1, 6)
    options = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(ids)}
    greedy = hf_model.generate(ids, **options)
    assert torch.equal(hf_model.generate(ids, assistant_model=assistant, **options), greedy)


def test_save_and_load_round_trip(hf_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from xverse.formats import load_model
    from xverse.model import FullCausal

    hf_model.save_pretrained(tmp_path / "copy", max_shard_size="60KB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    ids = tokens(1, 8)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(again(ids).logits, hf_model(ids).logits)
    assert again.config.to_dict() == {
        **hf_model.config.to_dict(),
        "_name_or_path": again.config.name_or_path,
    } or (again.config.to_diff_dict() == hf_model.config.to_diff_dict())
    ours = load_model(tmp_path / "copy")
    assert difference(ours(ids, FullCausal(1, 8)), hf_model(ids).logits) < TOLERANCE
    assert (tmp_path / "copy" / "modeling_xverse.py").exists()  # loads without importing xverse


def test_published_weights_dtype_and_device_map(upstream: Path) -> None:
    from transformers import AutoModelForCausalLM

    from xverse.formats import load_model
    from xverse.model import FullCausal

    model, info = AutoModelForCausalLM.from_pretrained(
        upstream, torch_dtype=torch.float32, device_map="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    ids = tokens(1, 8)
    expected = load_model(upstream, torch.float32)(ids, FullCausal(1, 8))
    assert difference(model(ids).logits, expected) < TOLERANCE
    half = AutoModelForCausalLM.from_pretrained(upstream, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.generation_config.top_k == 30


def test_layers_spread_over_devices(written: Path, hf_model: Any) -> None:
    from transformers import AutoModelForCausalLM

    spread = AutoModelForCausalLM.from_pretrained(
        written,
        device_map={
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.norm": "cpu",
            "lm_head": "disk",
        },
        offload_folder=written.parent / "offload",
    )
    batch = left_padded([tokens(1, 9, seed=2)[0], tokens(1, 5, seed=3)[0]])
    labels = batch["input_ids"]
    assert difference(spread(**batch).logits[:, -5:], hf_model(**batch).logits[:, -5:]) < TOLERANCE
    a, b = spread(**batch, labels=labels).loss, hf_model(**batch, labels=labels).loss
    assert abs(a - b) < TOLERANCE


def test_vocabulary_can_grow(hf_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf_model.resize_token_embeddings(704)
    hf_model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(1, 4)).logits.shape[-1] == 704


def test_config_conversion_and_refusals(core_model: Any) -> None:
    from xverse.config import UserError
    from xverse.hf import XverseConfig, XverseForCausalLM
    from xverse.model import named_shape

    config = XverseConfig.from_model_config(core_model.config)
    assert config.to_model_config() == core_model.config
    assert config.architectures == ["XverseForCausalLM"]
    assert XverseConfig().to_model_config() == named_shape("7b")
    theta = XverseConfig(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert theta.to_model_config().rope_theta == 500000.0
    with pytest.raises(UserError, match="rope scaling"):
        XverseConfig(rope_parameters={"rope_type": "longrope", "factor": 4.0})
    with pytest.raises(UserError, match="grouped-query"):
        XverseForCausalLM(XverseConfig(num_key_value_heads=8))


def test_pipeline(written: Path) -> None:
    from transformers import pipeline

    import xverse  # noqa: F401

    generator = pipeline("text-generation", model=str(written))
    texts = generator(["Hello", "北京是"], max_new_tokens=4, do_sample=False, batch_size=2)
    assert all(item[0]["generated_text"] for item in texts)
    reply = generator([{"role": "user", "content": "hi"}], max_new_tokens=4)[0]["generated_text"]
    assert [turn["role"] for turn in reply] == ["user", "assistant"]
