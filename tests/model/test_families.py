"""The Llama family in the one forward pass: random directories as published against transformers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.family_zoo import write_family, write_tokenizer
from xverse.config import UserError
from xverse.engine import Engine
from xverse.engine.request import Request
from xverse.engine.sampling_params import SamplingParams, from_generation_config
from xverse.formats import ModelDirectory, load_model
from xverse.formats.quantize import load_quantizing, quantize_directory, quick_settings
from xverse.hf import XverseConfig as XverseHfConfig
from xverse.model import FullCausal, Packed, XverseConfig
from xverse.model.families import FAMILIES
from xverse.tokenizer.general import load_tokenizer_of
from xverse.tokenizer.template import render, template_ids

VOCAB = 320
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "equal heads": ("Llama", {"num_key_value_heads": 6}),
    "one key head": ("Llama", {"num_key_value_heads": 1}),
    "tied, biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn with scales": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "yarn, not rounded": ("Llama", {"rope_parameters": {**YARN, "truncate": False, "finetuned": True}}),
    "linear": ("Llama", {"rope_parameters": LINEAR}),
    "dynamic": ("Llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}),
    "heads of 80": ("Llama", {"head_dim": 80, "hidden_act": "swish"}),
    "wide heads": ("Llama", {"head_dim": 64}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """transformers' model of a case, and its directory."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(case: str) -> tuple[Any, Path]:
        if case not in made:
            family, changes = CASES[case]
            config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
                    parameter.data += 0.3 * torch.randn_like(parameter)
            directory = tmp_path_factory.mktemp("family")
            model.save_pretrained(directory)
            made[case] = model, directory
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers(case: str, stock: Any) -> None:
    theirs, directory = stock(case)
    ours = load_model(directory)
    tokens = torch.randint(VOCAB, (2, 100), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert torch.allclose(ours(tokens, FullCausal(2, 100)), expected, atol=1e-4)
    assert ours.config.num_parameters() == sum(parameter.numel() for parameter in theirs.parameters())
    assert XverseConfig.from_json(ours.config.to_json()) == ours.config
    documents = (torch.arange(200) // 50).view(1, 200)  # packed: four documents in one row
    packed = ours(tokens.view(1, 200), Packed(documents))
    each = theirs(tokens.view(4, 50)).logits
    assert torch.allclose(packed.view(4, 50, -1), each, atol=1e-4)


class Ids:
    """A tokenizer of nothing: the engine needs its size and a decoder."""

    vocab_size = VOCAB
    hash = ""

    def stream(self, *_: Any, **options: Any) -> Any:
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""


def reply(engine: Engine, prompt: list[int], count: int) -> list[int]:
    sampling = SamplingParams(temperature=0, max_new_tokens=count)
    engine.submit(Request(prompt_ids=prompt, sampling=sampling, stop_ids=()))
    ids: list[int] = []
    while True:
        for event in engine.step():
            ids.append(event.token_id)  # type: ignore[arg-type]
            if event.finish_reason:
                return ids


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_engine_decodes_as_generate_does(case: str, kv_dtype: str, stock: Any) -> None:
    theirs, directory = stock(case)
    engine = Engine(load_model(directory), Ids(), max_cache_tokens=512, kv_dtype=kv_dtype)  # type: ignore[arg-type]
    prompt = list(range(3, 60))
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    ids = reply(engine, prompt, 12)
    assert ids == expected if kv_dtype == "auto" else ids[0] == expected[0]


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("int4", 0.3)])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_quantised_on_loading(case: str, kind: str, most: float, stock: Any) -> None:
    theirs, directory = stock(case)
    model = load_quantizing(directory, kind)
    tokens = torch.randint(VOCAB, (1, 64), generator=torch.Generator().manual_seed(1))
    expected, logits = theirs(tokens).logits, model(tokens, FullCausal(1, 64))
    assert (logits - expected).norm() < most * expected.norm()
    engine = Engine(model, Ids(), max_cache_tokens=512)  # type: ignore[arg-type]  # fused steps where they fit
    prompt = list(range(3, 40))
    first = model(torch.tensor([prompt]), FullCausal(1, len(prompt)))[0, -1].argmax().item()
    assert reply(engine, prompt, 3)[0] == first


REFUSED = {
    "sliding window": ({"model_type": "mistral", "sliding_window": 64}, "sliding_window 64"),
    "window layers": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "sliding",
    ),
    "another family": ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported"),
    "experts": ({"model_type": "llama", "num_local_experts": 8}, "num_local_experts = 8"),
    "soft caps": ({"model_type": "llama", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "mlp bias": ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
    "gelu": ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act"),
    "partly rotated": ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "long rope": (
        {"model_type": "llama", "rope_scaling": {"rope_type": "longrope", "long_factor": [2.0]}},
        "rope_type 'longrope' is not supported",
    ),
    "heads": ({"model_type": "llama", "num_key_value_heads": 4}, "not a multiple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_close_but_not_the_same_is_refused_by_name(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        XverseConfig.from_json({**SIZES, **values})
    assert "\n" not in str(error.value)


XVERSE = {**SIZES, "num_key_value_heads": 6, "model_type": "xverse"}
del XVERSE["head_dim"]


@pytest.mark.parametrize(
    ("changes", "where", "refused"),
    [
        ({"max_position_embeddings": 262144}, "config.json", True),
        ({"max_position_embeddings": 32768}, "config.json", True),
        ({"max_position_embeddings": 8192}, "XVERSE-13B-256K/config.json", True),
        ({"max_position_embeddings": 8192, "_name_or_path": "xverse/XVERSE-13B-256K"}, "config.json", True),
        ({"max_position_embeddings": 262144, "rope_theta": 500000}, "XVERSE-13B-256K/config.json", False),
        ({"max_position_embeddings": 8192}, "config.json", False),
        ({"max_position_embeddings": 16384, "hidden_size": 8192, "num_attention_heads": 64}, "x", False),
    ],
)
def test_a_rope_base_that_is_only_in_the_publishers_code(
    changes: dict[str, Any], where: str, refused: bool
) -> None:
    values = {**XVERSE, "num_key_value_heads": None, **changes}
    if refused:
        with pytest.raises(UserError, match='add "rope_theta"') as error:
            XverseConfig.from_json(values, where)
        assert "\n" not in str(error.value)
        if where == "config.json" and "_name_or_path" not in changes:
            kept = {key: value for key, value in values.items() if value is not None}
            with pytest.raises(UserError, match="rope_theta"):
                XverseHfConfig(**{k: v for k, v in kept.items() if k != "model_type"})
    else:
        assert XverseConfig.from_json(values, where).rope_theta == changes.get("rope_theta", 10000)


def test_internlm_has_biases_and_its_own_key_for_rope() -> None:
    values = {**SIZES, "num_key_value_heads": 6, "model_type": "internlm", "bias": True}
    config = XverseConfig.from_json({**values, "rotary": {"base": 20000, "type": "dynamic"}})
    assert (config.attention_bias, config.output_bias, config.rope_theta) == (True, True, 20000.0)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.context_length) == ("dynamic", 256)
    assert (
        XverseConfig.from_json({**values, "rotary": {"base": 10000, "type": "origin"}}).rope_scaling is None
    )


KEYS = [
    *("model_type", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("max_sequence_length", "head_dim", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "rotary", "layer_types"),
    *("sliding_window", "use_sliding_window", "tie_word_embeddings", "attention_bias"),
    *("bias", "mlp_bias", "hidden_act", "partial_rotary_factor"),
    *("pad_token_id", "eos_token_id", "num_experts", "moe_top_k"),
    *("num_shared_experts", "n_routed_experts", "norm_topk_prob", "initializer_range"),
    *("max_tokenizer_truncation", "attn_logit_softcapping"),
]
VALUES: list[Any] = [
    *(3, -1, 0, 2.5, True, None, float("nan"), float("inf"), 10**400, -(10**30), "x", "", [], [1], [{}], {}),
    *(
        {"a": 1},
        {"type": [1]},
        {"base": "x"},
        {"type": "linear"},
        {"rope_type": {}},
        {"rope_type": "dynamic"},
    ),
    *({"rope_type": "yarn", "factor": "x"}, {"type": "dynamic", "scaling_factor": "x"}),
]


@pytest.mark.parametrize("family", [*FAMILIES, "xverse_moe"])
def test_every_key_with_every_kind_of_value(family: str) -> None:
    """Read or refused in one line."""
    values = {**SIZES, "head_dim": None, "num_key_value_heads": 6, "model_type": family}
    messages = []
    for key in KEYS:
        for value in VALUES:
            try:
                XverseConfig.from_json({**values, key: value}).num_parameters()
            except UserError as error:
                messages.append(str(error))
    assert all(message.startswith("config.json: ") and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rotary": {"type": "linear"}}, "rotary type 'linear' is not supported"),
        ({"rotary": 5}, "rotary must be an object, found 5"),
        ({"rotary": {"base": "x"}}, "rope_theta: expected float, found str 'x'"),
        ({"rope_theta": 0}, "rope_theta must be above 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be above 0"),
        ({"layer_types": 3}, "layer_types must be a list"),
        ({"num_attention_heads": 7}, "does not split into 7 heads"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
    ],
)
def test_values_that_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        XverseConfig.from_json({**SIZES, "head_dim": None, "model_type": "internlm", **values})


def test_a_template_that_loops_is_refused() -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="without an end"):
        render(loops, [])


def test_xverse_is_unchanged() -> None:
    config = XverseConfig(
        vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    assert "num_key_value_heads" not in config.to_json()
    assert dataclasses.replace(config, hidden_size=128, head_dim=0).head_dim == 64


STORED = {
    "float64": (lambda t: t | {"model.norm.weight": t["model.norm.weight"].double()}, "stored as float64"),
    "another shape": (lambda t: t | {"model.norm.weight": torch.ones(3)}, "is 3 where the settings say 192"),
    "none": (lambda t: {k: v for k, v in t.items() if "0.mlp.up" not in k}, "missing model.layers.0.mlp.up"),
    "one too many": (lambda t: t | {"x": torch.ones(1)}, "unexpected x"),
    "another head": (lambda t: t | {"lm_head.weight": torch.ones(VOCAB, 192)}, "is not the embedding"),
    "the same head": (lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, ""),
}


@pytest.mark.parametrize("case", STORED)
def test_tensors_that_do_not_fit_the_configuration(case: str, stock: Any, tmp_path: Path) -> None:
    """By both readers: of a model as it is, and of one that is quantised meanwhile."""
    from safetensors.torch import load_file, save_file

    _, directory = stock("tied, biased")
    change, message = STORED[case]
    save_file(change(load_file(directory / "model.safetensors")), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    for read in (load_model, lambda path: load_quantizing(path, "int8")):
        if message:
            with pytest.raises(UserError, match=message):
                read(tmp_path)
        else:
            read(tmp_path)


def test_layers_that_no_group_divides() -> None:
    sizes = {**SIZES, "head_dim": None, "model_type": "llama", "hidden_size": 144}
    with pytest.raises(UserError, match="none of 32, 64, 128 up to 128 divides the 144 inputs"):
        quick_settings("int4", XverseConfig.from_json(sizes))


@pytest.mark.parametrize("case", ["biased", "qwen2", "qwen3"])
@torch.no_grad()
def test_written_quantised_and_read_again(case: str, tiny_texts: list[str], tmp_path: Path) -> None:
    """Biases and the norms of queries and keys are stored beside the packed weights."""
    family, changes = {"biased": ("Llama", {"attention_bias": True})}.get(case, CASES.get(case, ("", {})))
    theirs = write_family(tmp_path / "m", tiny_texts, family, **changes)
    source = ModelDirectory.of(tmp_path / "m")
    quantize_directory(source, tmp_path / "q", source.tokenizer, quick_settings("int8", source.config))
    tokens = torch.randint(source.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    for dequantize in (False, True):
        logits = load_model(tmp_path / "q", dequantize=dequantize)(tokens, FullCausal(1, 64))
        assert (logits - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (5, "chat_template must be a text"),
        ([{"name": "tool_use", "template": "x"}], "chat_template must be a text"),
        ([{"name": "default", "template": 5}], "chat_template must be a text"),
        ("", "writes nothing"),
        ("{% for %}", "chat template: Expected an expression"),
        ([{"name": "default", "template": "{{ messages[0].content }}"}], ""),
    ],
)
def test_chat_templates_as_stored(stored: Any, message: str, tmp_path: Path, tiny_texts: list[str]) -> None:
    write_tokenizer(tmp_path, tiny_texts, stored)
    messages = [{"role": "user", "content": "hello"}]
    if not message:
        tokenizer = load_tokenizer_of(tmp_path)
        assert template_ids(tokenizer, messages) == tokenizer.encode("hello")
        return
    with pytest.raises(UserError, match=message):
        template_ids(load_tokenizer_of(tmp_path), messages)


def test_a_wrong_value_of_generation_config_names_the_file() -> None:
    for values in ({"top_k": -1}, {"top_p": 2}, {"temperature": "x"}, {"repetition_penalty": 0}):
        with pytest.raises(UserError, match=r"^generation_config\.json: (?!generation)"):
            from_generation_config(values, SamplingParams())
