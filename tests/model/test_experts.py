"""XVERSE-MoE: routed experts in the one forward pass, against a plain loop and transformers' Qwen2Moe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from xverse.config import UserError
from xverse.engine import Engine
from xverse.engine.request import Request
from xverse.engine.sampling_params import SamplingParams
from xverse.finetune.methods import prepare, trainable
from xverse.finetune.settings import Settings
from xverse.formats import ModelDirectory, load_model
from xverse.formats.gguf import save_gguf
from xverse.formats.quantize import (
    Source,
    build,
    load_quantizing,
    mixed_formats,
    quick_settings,
    stored_bytes,
)
from xverse.formats.weights import SafetensorsWriter
from xverse.formats.write import save_llama
from xverse.hf import XverseForCausalLM as HfModel
from xverse.kernels.inference import use_kernels
from xverse.kernels.linear import QuantLinear
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM, init_weights, named_shape
from xverse.model.mlp import RoutedMLP
from xverse.plan.finetune_memory import trainable_parameters
from xverse.plan.layout import Architecture
from xverse.quant.quantizer import Quantizer
from xverse.quant.settings import QuantSettings

from .test_families import Ids

VOCAB = 320
# As upstream's config.json has them; 80 values a head, as the published model.
PUBLISHED: dict[str, Any] = {
    "architectures": ["XverseForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM"},
    "model_type": "xverse",
    "vocab_size": VOCAB,
    "hidden_size": 160,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "moe_top_k": 3,
    "num_shared_experts": 2,
    "max_position_embeddings": 256,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
CHANGES: dict[str, dict[str, Any]] = {
    "published": {},
    "normalised": {"norm_topk_prob": True},
    "none shared": {"num_shared_experts": None},
    "grouped heads": {"num_key_value_heads": 1, "model_type": "xverse_moe"},
}
TOKENS = torch.randint(4, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def write(path: Path, **changes: Any) -> Path:
    """A directory in the published layout, with code that must not run."""
    values = {**PUBLISHED, **changes}
    config = XverseConfig.from_json(values)
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    path.mkdir(exist_ok=True)
    writer = SafetensorsWriter(path, 1000, 10**9)
    for name, tensor in model.state_dict().items():
        noise = torch.Generator().manual_seed(len(name))
        grown = tensor * 8 if tensor.dim() > 1 else tensor + 0.3 * torch.randn(len(tensor), generator=noise)
        writer.add(name, grown)
    writer.close()
    (path / "config.json").write_text(json.dumps(values))
    (path / "modeling_xverse.py").write_text("raise SystemExit('code of a directory was run')")
    return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp("moe"), **changes) for name, changes in CHANGES.items()}


def plain_loop(layer: RoutedMLP, x: Tensor) -> Tensor:
    """The published arithmetic, token by token and expert by expert: x [N, D]."""
    rows = []
    for token in x:
        shares = torch.softmax(layer.router.weight @ token, dim=0)
        best = sorted(range(len(shares)), key=lambda expert: -shares[expert].item())[: layer.count]
        total = sum(shares[expert] for expert in best) if layer.normalised else 1.0
        networks = [(layer.experts[expert], shares[expert] / total) for expert in best]
        if layer.shared_experts is not None:
            networks.append((layer.shared_experts, 1.0))
        row = torch.zeros_like(token)
        for network, weight in networks:
            gate, up = (linear(token, p.weight) for p in (network.gate_proj, network.up_proj))
            row += weight * linear(silu(gate) * up, network.down_proj.weight)
        rows.append(row)
    return torch.stack(rows)


def as_qwen(model: XverseForCausalLM) -> Qwen2MoeForCausalLM:
    """The same function as transformers' class: no biases; its gate of the shared expert halves, which
    doubled weights undo."""
    c = model.config
    config = Qwen2MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        moe_intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
        shared_expert_intermediate_size=max(1, c.num_shared_experts) * c.intermediate_size,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        num_experts=c.num_experts, num_experts_per_tok=c.moe_top_k, norm_topk_prob=c.norm_topk_prob,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=False,
        max_position_embeddings=256, rms_norm_eps=c.rms_norm_eps, pad_token_id=None,
    )  # fmt: skip
    theirs = Qwen2MoeForCausalLM(config).eval()
    state = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if ".mlp." not in name:
            state[name] = tensor
    for number, layer in enumerate(model.model.layers):
        mlp, prefix = layer.mlp, f"model.layers.{number}.mlp."
        gates = [torch.cat([one.gate_proj.weight, one.up_proj.weight]) for one in mlp.experts]
        state[f"{prefix}gate.weight"] = mlp.router.weight
        state[f"{prefix}experts.gate_up_proj"] = torch.stack(gates)
        state[f"{prefix}experts.down_proj"] = torch.stack([one.down_proj.weight for one in mlp.experts])
        if mlp.shared_experts is not None:
            for name, tensor in mlp.shared_experts.state_dict().items():
                state[f"{prefix}shared_expert.{name}"] = tensor * (2 if name.startswith("down") else 1)
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("case", CHANGES)
@torch.no_grad()
def test_logits_equal_a_plain_loop_and_transformers(case: str, directories: dict[str, Path]) -> None:
    ours = load_model(directories[case])
    assert sum(p.numel() for p in ours.parameters()) == ours.config.num_parameters()
    assert XverseConfig.from_json(ours.config.to_json()) == ours.config
    logits = ours(TOKENS, FullCausal(*TOKENS.shape))
    expected = as_qwen(ours)(TOKENS).logits
    assert expected.std() > 0.5  # not nearly uniform
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    single = ours(TOKENS[:1, :1], FullCausal(1, 1))  # decoding computes a token's experts together
    torch.testing.assert_close(single, expected[:1, :1], atol=1e-4, rtol=0)
    layer = ours.model.layers[0].mlp
    x = torch.randn(12, ours.config.hidden_size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x), plain_loop(layer, x), atol=1e-5, rtol=0)
    wrapped = HfModel.from_pretrained(directories[case])
    torch.testing.assert_close(wrapped(TOKENS).logits, expected, atol=1e-4, rtol=0)


def test_only_activated_experts_are_read(directories: dict[str, Path]) -> None:
    layer = load_model(directories["published"]).model.layers[0].mlp
    with torch.no_grad():
        for rows in (1, 2):
            x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(rows))
            expected = layer(x)
            used = set(layer.route(x)[1].flatten().tolist())
            kept = {number: layer.experts[number] for number in range(8)}
            for number in set(range(8)) - used:
                layer.experts[number] = torch.nn.Identity()  # has none of the weights
            assert torch.equal(layer(x), expected)
            for number, expert in kept.items():
                layer.experts[number] = expert


def replies(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_new_tokens=count)
    handles = [engine.submit(Request(prompt_ids=p, sampling=sampling, stop_ids=())) for p in prompts]
    ids: dict[int, list[int]] = {handle: [] for handle in handles}
    ended = 0
    while ended < len(prompts):
        for event in engine.step():
            ids[event.handle].append(event.token_id)  # type: ignore[arg-type]
            ended += event.finish_reason is not None
    return [ids[handle] for handle in handles]


@torch.no_grad()
def test_the_engine_decodes_as_transformers_does(directories: dict[str, Path]) -> None:
    model = load_model(directories["published"])
    theirs = as_qwen(model)
    prompts = [TOKENS[0].tolist(), TOKENS[1, :20].tolist()]
    expected = [
        theirs.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]
    engine = Engine(model, Ids(), max_cache_tokens=512)  # type: ignore[arg-type]
    assert replies(engine, prompts, 8) == expected
    assert replies(engine, prompts[:1], 8) == expected[:1]


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.1), ("int4", 0.6)])
@torch.no_grad()
def test_quantised_on_loading(kind: str, most: float, directories: dict[str, Path]) -> None:
    # Where two experts have nearly the same share, rounding changes which one is chosen.
    expected = load_model(directories["published"])(TOKENS, FullCausal(*TOKENS.shape))
    model = load_quantizing(directories["published"], kind)
    layer = model.model.layers[0].mlp
    assert all(isinstance(one.down_proj, QuantLinear) for one in [*layer.experts, layer.shared_experts])
    assert not isinstance(layer.router, QuantLinear)
    use_kernels(model)
    logits = model(TOKENS, FullCausal(*TOKENS.shape))
    assert (logits - expected).norm() < most * expected.norm()
    single = model(TOKENS[:1, :1], FullCausal(1, 1))
    torch.testing.assert_close(single, logits[:1, :1], atol=0.02 * logits.std().item(), rtol=0)


@pytest.mark.parametrize("method", ["rtn", "rtn-row", "gptq"])
@torch.no_grad()
def test_every_method_quantises_experts(method: str, directories: dict[str, Path], tmp_path: Path) -> None:
    source = Source(ModelDirectory.of(directories["published"]))
    settings = QuantSettings(bits=8, method=method, group_size=32)  # type: ignore[arg-type]
    run = Quantizer(source.config, source.read, settings, calibration=TOKENS[:1], sample=TOKENS)
    model = build(source.config, run.tensors())
    assert run.report.kl < 0.05
    expected = load_model(directories["published"])(TOKENS, FullCausal(*TOKENS.shape))
    assert (model(TOKENS, FullCausal(*TOKENS.shape)) - expected).norm() < 0.1 * expected.norm()


def test_the_published_numbers_of_parameters() -> None:
    small, large = named_shape("moe-a4.2b"), named_shape("moe-a36b")
    published = [(25.8, 4.2), (255.4, 36.5)]
    for config, (total, active) in zip((small, large), published, strict=True):
        assert config.num_parameters() / 1e9 == pytest.approx(total, abs=0.05)
        assert config.num_parameters(active=True) / 1e9 == pytest.approx(active, abs=0.05)
        with torch.device("meta"):
            model = XverseForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    assert stored_bytes(small, quick_settings("int4", small)) < 15e9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' with num_local_experts = 8"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "'qwen2_moe' with num_experts = 60"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "'qwen3_moe'"),
        ({"model_type": "deepseek_v2", "n_routed_experts": 64}, "'deepseek_v2' with n_routed_experts"),
        ({"model_type": "ernie4_5_moe", "moe_num_experts": 64}, "'ernie4_5_moe' with moe_num_experts"),
        ({"num_experts": None, "n_routed_experts": 64}, "'xverse' with n_routed_experts"),
        ({"moe_top_k": 9}, "moe_top_k 9 is out of range"),
        ({"moe_top_k": 0}, "moe_top_k 0 is out of range"),
        ({"num_experts": -1}, "must not be negative"),
    ],
)
def test_other_experts_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    published = {**PUBLISHED, **({"num_experts": None} if "model_type" in values else {})}
    with pytest.raises(UserError, match=message) as error:
        XverseConfig.from_json({**published, **values})
    assert "\n" not in str(error.value)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("method", ["full", "lora", "freeze"])
def test_experts_are_trained(method: str, directories: dict[str, Path], tmp_path: Path) -> None:
    settings = Settings(
        model_name_or_path=str(directories["published"]), output_dir=tmp_path, dataset="x",
        do_train=True, finetuning_type=method, lora_target="all", freeze_trainable_layers=1,
    )  # fmt: skip
    wrapped = HfModel.of(load_model(directories["published"]), {})
    model = prepare(wrapped, settings)
    predicted = trainable_parameters(wrapped.config.to_model_config(), settings)
    assert trainable(model)[0] == pytest.approx(predicted, rel=0.01 if method == "freeze" else 0)  # norms
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    if method == "full":  # through the softmax of the router, too
        assert wrapped.model.layers[0].mlp.router.weight.requires_grad


def test_where_experts_are_not_supported(directories: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = load_model(directories["published"]), Ids()
    refused = [
        lambda: Architecture.of(model.config),
        lambda: save_gguf(model, tokenizer, tmp_path / "x.gguf"),  # type: ignore[arg-type]
        lambda: save_llama(model, tokenizer, tmp_path / "x"),  # type: ignore[arg-type]
        lambda: mixed_formats(
            ModelDirectory.of(directories["published"]), 4.5, TOKENS, quick_settings("int4", model.config)
        ),
    ]
    for call in refused:
        with pytest.raises(UserError, match="routed experts"):
            call()
