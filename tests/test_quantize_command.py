"""``xverse quantize``, ``xverse chat --quantize`` and ``xverse export`` of quantised directories."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forkserver
from xverse.cli import main
from xverse.formats import ModelDirectory, load_model, logits, parity, save_hf
from xverse.formats.compare import fixed_tokens
from xverse.kernels.linear import QuantLinear
from xverse.model import XverseForCausalLM, init_weights

GENERATION = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "top_k": 30, "max_new_tokens": 5}


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.quant.text.CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr("xverse.quant.tuning.STEPS", 2)


@pytest.fixture(scope="module")
def source(wide_config: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    path = tmp_path_factory.mktemp("source")
    (path / "LICENSE").write_text("the weights' terms")
    save_hf(model, tiny_tokenizer, path / "model", torch.bfloat16, GENERATION, documents=path)
    return path / "model"


def command(source: Path, out: Path, *more: str, bits: str = "4") -> list[str]:
    """``bits`` with a point are an average."""
    flag = "--bpw" if "." in bits else "--bits"
    return ["quantize", "--model", str(source), "--out", str(out), flag, bits, *more]


@pytest.mark.parametrize("method", ["rtn", "rtn-row", "gptq"])
@pytest.mark.parametrize("layout", ["hf", "llama"])
def test_writes_a_directory_and_its_parity(
    source: Path,
    tiny_texts: list[str],
    tmp_path: Path,
    method: str,
    layout: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--method", method, "--format", layout]
    if method == "gptq":
        (tmp_path / "text.txt").write_text("\n".join(tiny_texts), encoding="utf-8")
        more += ["--calibration", str(tmp_path / "text.txt")]
    out = tmp_path / "out"
    assert main(command(source, out, *more)) == 0
    first, *report = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: {layout}, 4 bits, {method}, ")
    text = "\n".join(report)
    for part in ("KL ", "perplexity", "same first choice", "times smaller", "layer"):
        assert part in text
    if layout == "llama":
        assert ModelDirectory.of(out).config.model_type == "llama"
    else:
        assert ModelDirectory.of(out).config == ModelDirectory.of(source).config
    assert ModelDirectory.of(out).generation_config == GENERATION
    assert (out / "LICENSE").read_text() == "the weights' terms"
    tokens = fixed_tokens(ModelDirectory.of(source).config.vocab_size)
    expected = logits(load_model(source), tokens)
    assert (logits(load_model(out), tokens) - expected).norm() / expected.norm() < 0.5
    assert main(command(source, out, *more)) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(command(source, out, *more, "--overwrite", bits="8")) == 0


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--bits", "5"], "bits: 5 is not supported; 8, 4, 3 or 2"),
        (["--method", "gtpq"], "did you mean 'gptq'?"),
        (["--group-size", "100"], "group_size: 100 is not supported; one of 32, 64, 128"),
        (["--method", "rtn-row", "--calibration", "x.txt"], "rtn-row measures nothing"),
        (["--method", "rtn", "--refine"], "--refine is for --method gptq"),
        (["--bpw", "4.5"], "give either --bits (8, 4, 3 or 2) or --bpw"),
        (["--model", "nowhere"], "no model 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(
    source: Path, tmp_path: Path, more: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(source, tmp_path / "out", *more)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert not list(tmp_path.iterdir())


def test_calibration_text_that_is_none(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    arguments = command(source, tmp_path / "out", "--method", "gptq", "--calibration", str(text))
    for content, part in ((None, "no such file"), (b"", "is empty"), (b"\x80\x81\xfe", "UTF-8")):
        if content is not None:
            text.write_bytes(content)
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert part in error
        assert str(text) in error
        assert error.count("\n") == 1


def test_calibration_in_a_language_that_the_model_does_not_know(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ᚠᚢᚦᚨᚱᚲ " * 100, encoding="utf-8")
    assert main(command(source, tmp_path / "out", "--method", "gptq", "--calibration", str(text))) == 0
    assert "single bytes" in capsys.readouterr().err


def test_group_that_does_not_divide(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "model")
    assert main(command(tmp_path / "model", tmp_path / "out", "--group-size", "128")) == 0
    assert "groups of 64 for 64 inputs" in capsys.readouterr().err
    assert load_model(tmp_path / "out").model.layers[0].mlp.gate_proj.group_size == 64


@pytest.mark.parametrize(
    ("bits", "more", "part"),
    [
        ("2.0", [], "this model takes 2.1"),
        ("3.0", ["--levels", "integers"], "this model takes 4.1"),
        ("9.5", [], "expected bits per weight, such as 4.5, from 2 to 8.5"),
        ("nan.", [], "expected bits per weight, such as 4.5"),
        ("4.5", ["--group-size", "64"], "it excludes --method rtn-row, --group-size and --format llama"),
        ("4.5", ["--format", "llama"], "it excludes --method rtn-row, --group-size and --format llama"),
    ],
)
def test_average_bits_out_of_range(
    source: Path, tmp_path: Path, bits: str, more: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(source, tmp_path / "out", *more, bits=bits)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert part in captured.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_average_bits_mix_formats(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(source, tmp_path / "out", bits="5.0")) == 0
    assert "5 bits on average, gptq, " in capsys.readouterr().out
    model = load_model(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len({(layer.bits, layer.group_size) for layer in layers}) > 1
    for layer in model.model.layers:
        attention = layer.self_attn
        assert len({(x.bits, x.group_size) for x in (attention.q_proj, attention.k_proj)}) == 1
    weights = [layer.to_weight() for layer in layers]
    stored = 8 * sum(weight.stored_bytes for weight in weights) / sum(weight.q.numel() for weight in weights)
    assert 4.8 < stored <= 5


def test_a_quantised_model_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(source, tmp_path / "q")) == 0
    capsys.readouterr()
    assert main(command(tmp_path / "q", tmp_path / "out")) == 2
    assert main(["chat", "--model", str(tmp_path / "q"), "--quantize", "int8", "--ask", "你好"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == second
    assert "is already quantised" in first
    assert not (tmp_path / "out").exists()


def test_the_model_itself_is_not_replaced(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(source, source, "--overwrite")) == 2
    assert "is the source model" in capsys.readouterr().err
    assert load_model(source).lm_head.weight.dtype == torch.bfloat16


def test_damaged_source_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    assert main(command(broken, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj.weight" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("small_disk", ["300k"], indirect=True)
def test_no_room_is_told_before_the_work(
    source: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "filler").write_bytes(bytes(200_000))
    assert main(command(source, small_disk / "out")) == 2
    error = capsys.readouterr().err
    assert "are free; nothing was written" in error
    assert error.count("\n") == 1
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("small_disk", ["300k"], indirect=True)
def test_disk_full_while_writing(
    source: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xverse.formats import quantize

    monkeypatch.setattr(quantize, "stored_bytes", lambda *arguments: 0)
    (small_disk / "filler").write_bytes(bytes(150_000))
    assert main(command(source, small_disk / "out")) == 2
    assert capsys.readouterr().err == f"xverse: {small_disk / 'out'}: the disk is full; nothing was written\n"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_file_size_limit_is_one_clear_line(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from xverse.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = command(source, tmp_path / "out")
    result = forkserver.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"xverse: {tmp_path / 'out'}: File too large; nothing was written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_chat_quantises_as_it_loads(source: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["chat", "--model", str(source), "--ask", "你好", "--greedy", "--max-new-tokens", "3"]
    assert main([*arguments, "--quantize", kind]) == 0
    capsys.readouterr()
    assert main([*arguments, "--quantize", kind]) == 0
    assert main([*arguments, "--quantize", kind, "--quantize", kind]) == 0


def test_quantising_while_loading_equals_the_directory(source: Path, tmp_path: Path) -> None:
    from xverse.formats.quantize import load_quantizing

    assert main(command(source, tmp_path / "q", "--method", "rtn")) == 0
    tokens = fixed_tokens(ModelDirectory.of(source).config.vocab_size)
    model = load_quantizing(source, "int4")
    assert torch.equal(logits(model, tokens), logits(load_model(tmp_path / "q"), tokens))


@pytest.mark.parametrize("layout", ["hf", "llama"])
def test_export_dequantises(
    source: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(source, tmp_path / "q")) == 0
    capsys.readouterr()
    out = tmp_path / "plain"
    arguments = ["--model", str(tmp_path / "q"), "--out", str(out), "--format", layout, "--type", "f32"]
    assert main(["export", *arguments]) == 0
    assert parity(load_model(tmp_path / "q", dequantize=True), load_model(out)) == 0.0
    assert "quantization_config" not in (out / "config.json").read_text()
