"""What wrappers and users pass: forward's arguments, pipelines, chat's options, other libraries."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.scale import ALL
from xverse.config import UserError

IDS = torch.randint(4, 700, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(2), 0)
ADDITIVE = torch.full((2, 1, 9, 9), torch.finfo(torch.float32).min).triu(1)
FORWARD: list[dict[str, Any]] = [
    {},
    {"attention_mask": MASK},
    {"attention_mask": ADDITIVE},
    {"attention_mask": ADDITIVE == 0},
    {"attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)},
    {"position_ids": torch.arange(100, 109)[None]},
    {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]), "use_cache": False},
    {"labels": IDS},
    {"labels": IDS, "num_items_in_batch": torch.tensor(50)},
    {"labels": IDS, "num_items_in_batch": 50},
    {"labels": IDS, "return_dict": False},
    {"use_cache": False},
    {"use_cache": True},
    {"output_attentions": True, "attention_mask": MASK},
    {"output_hidden_states": True},
    {"output_hidden_states": [0, -1]},
    {"logits_to_keep": 1},
    {"logits_to_keep": torch.tensor([0, 5])},
    {"is_causal": False, "attention_mask": MASK},
    {"is_causal": True},
    {"cu_seq_lens_q": None, "max_length_q": None, "output_router_logits": False},
]


def tensors(output: Any) -> list[Tensor]:
    items = output.values() if hasattr(output, "values") else output
    found = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            found += tensors(item)
    return found


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arguments", FORWARD, ids=lambda arguments: ",".join(arguments) or "ids")
def test_forward(pair: Any, attention: str, arguments: dict[str, Any]) -> None:
    if attention == "eager" and getattr(arguments.get("attention_mask"), "dtype", None) == torch.bool:
        pytest.skip("eager attention adds its mask")
    ours, theirs = (model(IDS, **arguments) for model in pair[attention])
    if hasattr(theirs, "keys"):
        assert list(ours.keys()) == list(theirs.keys())
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_training_returns_logits_unless_told_not_to(pair: Any) -> None:
    ours = copy.deepcopy(pair["sdpa"][0]).train()
    output = ours(IDS, labels=IDS)
    torch.testing.assert_close(output.logits, pair["sdpa"][1](IDS).logits, atol=1e-4, rtol=1e-4)
    assert ours(IDS, labels=IDS, skip_logits=True).logits is None
    ours.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + vocab_size
    assert ours(IDS, labels=IDS).loss == 700


@torch.no_grad()
def test_base_model(pair: Any, written: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    ours, theirs = pair["sdpa"]
    expected = theirs.model(IDS, attention_mask=MASK).last_hidden_state
    for model in (ours.model, AutoModel.from_pretrained(written)):
        found = model(IDS, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert ours.get_decoder() is ours.model


@torch.no_grad()
def test_implementations_of_attention(pair: Any, written: Path) -> None:
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options["scaling"])
        return sdpa_attention_forward(*args, **options)

    AttentionInterface.register("counted", counted)
    model = AutoModelForCausalLM.from_pretrained(written, attn_implementation="counted")
    model(IDS)
    assert len(calls) == 2
    model.set_attn_implementation("eager")
    assert len(model(IDS, output_attentions=True).attentions) == 2
    for name in ("flash_attention_2", "flash_attention_3", "nonsense"):
        outcomes = []
        for kind in pair["sdpa"]:
            with pytest.raises((ImportError, ValueError)) as refused:
                type(kind)(copy.deepcopy(kind.config)).set_attn_implementation(name)
            outcomes.append(type(refused.value))
        assert outcomes[0] is outcomes[1]


@torch.no_grad()
def test_compiled(pair: Any) -> None:
    ours = copy.deepcopy(pair["sdpa"][0])
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for attention_mask in (None, MASK):
        found = compiled(IDS, attention_mask=attention_mask, use_cache=False).logits
        expected = pair["sdpa"][1](IDS, attention_mask=attention_mask).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_peft_and_its_cached_prefix(pair: Any) -> None:
    peft = pytest.importorskip("peft")
    for settings in (
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        results = []
        for model in pair["sdpa"]:
            torch.manual_seed(0)
            adapted = peft.get_peft_model(copy.deepcopy(model), settings)
            adapted.train()
            output = adapted(input_ids=IDS, attention_mask=MASK, labels=IDS)
            output.loss.backward()
            adapted.eval()
            if isinstance(settings, peft.PrefixTuningConfig):  # generate gets two caches from PEFT 0.21
                results.append((output.loss.item(), None))
                continue
            ids = adapted.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
            results.append((output.loss.item(), ids.tolist()))
        assert results[0][0] == pytest.approx(results[1][0], abs=1e-4), settings
        assert results[0][1] == results[1][1], settings


def test_accelerate(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Accelerate's state is the process's: a Trainer of an earlier test leaves its bfloat16 autocast there.
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    try:
        model = Accelerator(cpu=True, mixed_precision="no").prepare(copy.deepcopy(pair["sdpa"][0]))
        torch.testing.assert_close(model(IDS).logits, pair["sdpa"][1](IDS).logits, atol=1e-4, rtol=1e-4)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_full_text": False},
        {"return_tensors": True},
        {"prefix": "Say: "},
        {"handle_long_generation": "hole"},
        {"stop_sequence": "e"},
        {"truncation": True, "max_length": 4, "max_new_tokens": None},
        {"clean_up_tokenization_spaces": True},
        {"skip_special_tokens": False},
        {"add_special_tokens": True},
        {"num_return_sequences": 2, "num_beams": 2},
        {"stop_strings": ["e"], "tokenizer": True},
        {"streamer": True},
        {"batch_size": 2},
        {"generation_config": True},
        {"tokenizer_encode_kwargs": {"max_length": 3, "truncation": True}},
        {"do_sample": True, "top_k": 3, "temperature": 0.8},
    ],
    ids=str,
)
def test_pipeline_options(pair: Any, hf_tokenizer: Any, options: dict[str, Any]) -> None:
    from transformers import GenerationConfig, TextStreamer, pipeline

    def run(model: Any, inputs: Any) -> Any:
        given = {"max_new_tokens": 4, "do_sample": False, **options}
        if "tokenizer" in given:
            given["tokenizer"] = hf_tokenizer
        if "streamer" in given:
            given["streamer"] = TextStreamer(hf_tokenizer)
        if "generation_config" in given:
            given["generation_config"] = GenerationConfig(max_new_tokens=3, do_sample=False)
        torch.manual_seed(0)
        try:
            return pipeline("text-generation", model=model, tokenizer=hf_tokenizer)(inputs, **given)
        except Exception as error:
            return type(error)

    turns = [{"role": "user", "content": "hi"}]
    for inputs in ("Hello", ["Hello", "北京是"], turns, [turns, turns]):
        if "streamer" in options and inputs != "Hello":
            continue
        ours, theirs = (run(model, inputs) for model in pair["sdpa"])
        assert str(ours) == str(theirs)


@pytest.fixture
def chatting(pair: Any) -> Any:
    from transformers import GenerationConfig

    model = copy.copy(pair["sdpa"][0])
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=6, eos_token_id=3, pad_token_id=1
    )
    return model


def test_chat_options(chatting: Any, hf_tokenizer: Any) -> None:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    messages = [{"role": "user", "content": "Hello"}]
    seen: list[int] = []

    def count(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        seen.append(ids.shape[1])
        return scores

    whole = chatting.chat(hf_tokenizer, messages)
    short = chatting.chat(hf_tokenizer, messages, max_new_tokens=2)
    assert whole.startswith(short)
    assert len(short) < len(whole)
    config = GenerationConfig(do_sample=False, max_new_tokens=2, eos_token_id=3)
    assert chatting.chat(hf_tokenizer, messages, generation_config=config) == short
    assert chatting.chat(hf_tokenizer, messages, generation_config=config, max_new_tokens=6) == whole
    assert "".join(chatting.chat(hf_tokenizer, messages, stream=True, max_new_tokens=2)) == short
    chatting.chat(hf_tokenizer, messages, logits_processor=LogitsProcessorList([count]), max_new_tokens=3)
    assert len(seen) == 3
    stop = StoppingCriteriaList([lambda ids, scores, **_: torch.ones(1, dtype=torch.bool)])
    for stream in (False, True):
        stopped = chatting.chat(hf_tokenizer, messages, stream=stream, stopping_criteria=stop)
        assert whole.startswith("".join(stopped))
        assert "".join(stopped) != whole
    assert chatting.chat(hf_tokenizer, messages, num_beams=2)
    assert chatting.chat(hf_tokenizer, messages, frequency_penalty=2.0, presence_penalty=2.0)
    for options, message in [
        ({"max_new_token": 2}, "did you mean 'max_new_tokens'"),
        ({"seed": 2}, "unknown key 'seed'"),
        ({"num_return_sequences": 2}, "one reply"),
        ({"return_dict_in_generate": True}, "one reply"),
        ({"stream": True, "streamer": object()}, "mutually exclusive"),
    ]:
        with pytest.raises(UserError, match=message):
            chatting.chat(hf_tokenizer, messages, **options)


def test_chat_never_draws_ids_of_a_padded_vocabulary(chatting: Any, hf_tokenizer: Any) -> None:
    model = copy.deepcopy(chatting)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == 704
    messages = [{"role": "user", "content": "Hello"}]
    expected = chatting.chat(hf_tokenizer, messages)
    with torch.no_grad():
        model.lm_head.weight[700:] = model.lm_head.weight[4:8] * 3
    for options in ({}, {"do_sample": True, "top_k": 1}, {"num_beams": 2}, {"stream": True}):
        reply = "".join(model.chat(hf_tokenizer, messages, **options))
        assert reply
        if not options:
            assert reply == expected
    assert model.chat(hf_tokenizer, messages, suppress_tokens=[4, 5])


def test_importing_ours_first_registers_without_a_warning() -> None:
    """Each of our modules is the first import of a process. Those are forked from one that has imported what
    transformers imports, which takes most of the time."""
    modules = ("xverse.hf", "xverse.hf.modeling", "xverse.hf.tokenization", "xverse.hf.quantization")
    program = f"""
import os, warnings
import scipy.optimize, torch._dynamo, torch.distributed.tensor
warnings.filterwarnings("error", message=".*xverse.*")
for first in {modules if ALL else modules[1:3]}:
    pid = os.fork()
    if not pid:
        __import__(first)
        from transformers import AutoConfig, AutoModel
        assert type(AutoConfig.for_model("xverse")) in AutoModel._model_mapping, first
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, first
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
