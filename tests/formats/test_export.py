"""``xverse export`` and the memory that loading takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from xverse.cli import main
from xverse.commands.export import parse_size
from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model, parity


@pytest.mark.parametrize("kind", ["hf", "llama"])
def test_export_prints_its_parity(
    upstream: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", "--model", str(upstream), "--out", str(out), "--format", kind]
    assert main([*arguments, "--max-shard-size", "150KB"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{out}: {kind}, bfloat16"
    assert second.startswith("parity: max |Δlogit| = ")
    assert float(second.split("= ")[1].split()[0]) <= 1e-4
    assert len(list(out.glob("*.safetensors"))) > 1
    assert parity(load_model(upstream), load_model(out)) == 0.0
    assert ModelDirectory.of(out).generation_config == ModelDirectory.of(upstream).generation_config
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--type", "f16"]) == 0
    assert "float16" in capsys.readouterr().out


def test_export_of_nonsense(upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), "--format", "hf"]
    for arguments in (
        ["--model", str(tmp_path / "nothing"), *out],
        ["--model", str(tmp_path), *out],
        ["--model", str(upstream), *out, "--max-shard-size", "much"],
    ):
        assert main(["export", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_sizes() -> None:
    assert [parse_size(text) for text in ("2GB", "500 mb", "1.5G", "7")] == [
        2 * 10**9,
        5 * 10**8,
        15 * 10**8,
        7,
    ]
    for text in ("", "0GB", "-1GB", "2 gigs", "GB"):
        with pytest.raises(UserError, match="max-shard-size"):
            parse_size(text)
