"""GGUF files: what stands in them, read with the ``gguf`` package, and ``xverse export --format gguf``."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests import forkserver
from xverse.cli import main
from xverse.config import UserError
from xverse.formats import load_model, open_gguf, parity, save_gguf
from xverse.formats.gguf import KINDS, gguf_name, half_rows, licence_of, pair_rows
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM, init_weights
from xverse.model.rope import rope_tables, rotate
from xverse.model.scaling import RopeScaling
from xverse.tokenizer import CHAT_TEMPLATE, Tokenizer

NANO = Path(__file__).parents[2] / "src" / "xverse" / "assets" / "nano"


def metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))


def test_metadata(model: Any, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    settings = {"temperature": 0.5, "top_k": 30, "top_p": 0.85, "repetition_penalty": 1.1, "do_sample": True}
    save_gguf(model, tiny_tokenizer, path, name="tiny", licence="cc-by-nc-4.0", generation_config=settings)
    found = metadata(path)
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.license": "cc-by-nc-4.0",
        "general.file_type": 1,
        "general.sampling.temp": pytest.approx(0.5),
        "general.sampling.top_k": 30,
        "general.sampling.top_p": pytest.approx(0.85),
        "general.sampling.penalty_repeat": pytest.approx(1.1),
        "llama.vocab_size": tiny_tokenizer.vocab_size,
        "llama.context_length": 8192,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert len(found["tokenizer.ggml.tokens"]) == tiny_tokenizer.vocab_size
    assert found["tokenizer.ggml.tokens"][:4] == ["<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>"]


def test_rows_in_pairs_rotate_as_halves_do() -> None:
    heads, size, length = 3, 8, 5
    weight = torch.randn(heads * size, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(half_rows(pair_rows(weight, heads), heads), weight)
    x = torch.randn(length, 7, generator=torch.Generator().manual_seed(1))
    config = XverseConfig(
        vocab_size=9,
        hidden_size=heads * size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=heads,
    )
    cos, sin = rope_tables(torch.arange(length)[None], config)
    halves = rotate((x @ weight.T).view(1, length, heads, size).transpose(1, 2), cos, sin)
    pairs = (x @ pair_rows(weight, heads).T).view(1, length, heads, size // 2, 2).transpose(1, 2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(cos[..., : size // 2]), torch.atan2(sin, cos)[..., : size // 2]
    )
    torch.testing.assert_close(torch.view_as_real(turned).transpose(-1, -2).flatten(-2), halves)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_weights_of_16_bits_come_back_as_they_are(
    model: Any, tiny_tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    source = copy.deepcopy(model).to(torch.float16 if kind == "f16" else torch.bfloat16)
    save_gguf(source, tiny_tokenizer, tmp_path / "m.gguf", kind)
    tensors = stored(tmp_path / "m.gguf")
    state = source.state_dict()
    assert set(tensors) == {gguf_name(name) for name in state}
    for name, weight in state.items():
        tensor = tensors[gguf_name(name)]
        assert tensor.tensor_type.name == ("F32" if weight.dim() == 1 else kind.upper())
        wanted = pair_rows(weight, 4) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight
        assert torch.equal(values(tensor), wanted.float())
    assert parity(source, open_gguf(tmp_path / "m.gguf")) == 0.0


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_are_within_their_error(
    model: Any, tiny_tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    """Half a step in 8 bits. In 4 a whole one, at the end of the range that has only 7 steps. And the scale's
    own rounding to float16, times the largest number of steps."""
    save_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", kind)
    tensors = stored(tmp_path / "m.gguf")
    for name, weight in model.state_dict().items():
        tensor = tensors[gguf_name(name)]
        if weight.dim() == 1:
            assert torch.equal(values(tensor), weight.float())
            continue
        finer = kind == "q8_0" or name in ("lm_head.weight", "model.embed_tokens.weight")
        assert tensor.tensor_type.name == ("Q8_0" if finer else "Q4_0")
        wanted = pair_rows(weight, 4) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight
        blocks = wanted.float().unflatten(-1, (-1, 32))
        error = (values(tensor).view_as(blocks) - blocks).abs().amax(-1)
        bound = (0.5 / 127 if finer else 1 / 8) + 2**-11
        assert (error <= blocks.abs().amax(-1) * bound + 1e-7).all()
    assert 0.0 < parity(model, open_gguf(tmp_path / "m.gguf")) < 1.0


def test_rows_that_are_no_whole_blocks_stay_in_16_bits(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = XverseConfig(
        vocab_size=tiny_tokenizer.vocab_size + 3,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    save_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "q4_0")
    types = {name: tensor.tensor_type.name for name, tensor in stored(tmp_path / "m.gguf").items()}
    assert types["blk.0.ffn_down.weight"] == "Q4_0"
    assert types["blk.0.ffn_up.weight"] == types["output.weight"] == "F16"
    assert parity(model, open_gguf(tmp_path / "m.gguf")) < 0.2
    tokens = metadata(tmp_path / "m.gguf")["tokenizer.ggml.tokens"]
    assert tokens[-1] == f"[UNUSED_{config.vocab_size - 1}]"


def test_refusals(model: Any, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "there.gguf").write_bytes(b"old")
    for name, kind, message in (
        ("m.bin", "f16", "must end in .gguf"),
        ("folder.gguf", "f16", "is a directory"),
        ("there.gguf", "f16", "--overwrite"),
        ("m.gguf", "q8_1", "unknown type 'q8_1'; did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            save_gguf(model, tiny_tokenizer, tmp_path / name, kind)
    assert (tmp_path / "there.gguf").read_bytes() == b"old"
    save_gguf(model, tiny_tokenizer, tmp_path / "there.gguf", overwrite=True)
    assert parity(model, open_gguf(tmp_path / "there.gguf")) < 1e-3
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder.gguf", "there.gguf"]


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_a_weight_out_of_range_is_named(
    model: Any, tiny_tokenizer: Tokenizer, tmp_path: Path, value: float
) -> None:
    source = copy.deepcopy(model)
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight: f16 cannot hold") as caught:
        save_gguf(source, tiny_tokenizer, tmp_path / "m.gguf")
    assert ("bf16 holds it" in str(caught.value)) == (value == 7e4)
    assert not list(tmp_path.iterdir())


def test_disk_full_leaves_the_old_file(model: Any, tiny_tokenizer: Tokenizer, small_disk: Path) -> None:
    path = small_disk / "m.gguf"
    path.write_bytes(b"old")
    for filler in (400_000, 590_000):  # full among the tensors, full in the header
        (small_disk / "filler").write_bytes(bytes(filler))
        with pytest.raises(UserError) as caught:
            save_gguf(model, tiny_tokenizer, path, overwrite=True)
        assert str(caught.value) == f"{path}: the disk is full; nothing was written"
        assert sorted(item.name for item in small_disk.iterdir()) == ["filler", "m.gguf"]
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("limit", [1_000, 100_000])
def test_file_size_limit_is_one_clear_line(upstream: Path, tmp_path: Path, limit: int) -> None:
    pytest.importorskip("resource")
    program = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from xverse.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "m.gguf"
    arguments = ["export", "--model", str(upstream), "--out", str(out), "--format", "gguf"]
    result = forkserver.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"xverse: {out}: File too large; nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_command(upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    arguments = ["export", "--model", str(upstream), "--out", str(out), "--format", "gguf"]
    assert main(arguments) == 0
    file, figure, tokens = capsys.readouterr().out.splitlines()
    assert file == f"{out}: gguf, f16, {out.stat().st_size / 1e6:,.1f} MB"
    assert figure.startswith("parity: max |Δlogit| = ")
    assert float(figure.split("= ")[1].split()[0]) < 1e-3
    assert tokens == "tokenizer: llama.cpp's ids differ from xverse's for 0 of 2,000 random texts"
    assert metadata(out)["general.name"] == "XVERSE-7B-Chat"
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    for kind in KINDS:
        assert main([*arguments, "--overwrite", "--type", kind]) == 0
        assert f"gguf, {kind}, " in capsys.readouterr().out
    assert parity(load_model(upstream), open_gguf(out)) < 1.0


def test_command_refuses_what_does_not_fit(
    upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--format", "hf", "--type", "q8_0", "--out", "m"], "known: f32, f16, bf16"),
        (["--format", "llama", "--type", "q4_0", "--out", "m"], "known: f32, f16, bf16"),
        (["--format", "gguf", "--out", "m"], "must end in .gguf"),
        (["--format", "gguf", "--out", "m.gguf", "--max-shard-size", "1GB"], "GGUF is one file"),
    ):
        at = arguments.index("--out") + 1
        arguments[at] = str(tmp_path / arguments[at])
        assert main(["export", "--model", str(upstream), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_licence_comes_from_the_card(tmp_path: Path) -> None:
    assert licence_of(NANO) == "cc-by-nc-4.0"
    assert licence_of(tmp_path) == ""
    (tmp_path / "README.md").write_text("# A model\n\nlicense: apache-2.0\n")
    assert licence_of(tmp_path) == ""


def test_transformers_reads_the_file(model: Any, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A reader that is not ours, and that knows nothing but the file."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    save_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "bf16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert parity(model, loaded) <= 1e-5


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_is_written(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, kind: str) -> None:
    original = 64 if kind == "yarn" else None
    scaling = RopeScaling(rope_type=kind, factor=4.0, original_max_position_embeddings=original)
    config = replace(tiny_model.config, max_position_embeddings=64, rope_scaling=scaling)
    scaled = XverseForCausalLM(config).eval()
    scaled.load_state_dict(tiny_model.state_dict())
    save_gguf(scaled, tiny_tokenizer, tmp_path / "model.gguf", "f16")
    again = open_gguf(tmp_path / "model.gguf")
    assert again.config.rope_scaling == scaling
    assert again.config.context_length == 256
    ids = torch.randint(4, 200, (1, 100))
    with torch.inference_mode():
        found, expected = (each(ids, FullCausal(1, 100)) for each in (again, scaled))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_rope_scaling_that_a_file_cannot_say_is_refused(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for scaling, part in (
        (RopeScaling(rope_type="dynamic", factor=2.0), "no dynamic rope scaling"),
        (RopeScaling(rope_type="yarn", factor=2.0, beta_fast=9.0), "beta_fast = 9.0"),
    ):
        scaled = XverseForCausalLM(replace(tiny_model.config, rope_scaling=scaling))
        with pytest.raises(UserError, match=part):
            save_gguf(scaled, tiny_tokenizer, tmp_path / "model.gguf")
