"""Every command that runs a model takes --device, and says in one line why it cannot use one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xverse import nvidia
from xverse.cli import main, verb_parser

COMMANDS = [
    ["chat", "--ask", "x"],
    ["serve", "--port", "0"],
    ["quantize", "--bits", "4", "--out", "OUT"],
    ["export", "--format", "hf", "--out", "OUT"],
    ["export", "--format", "gguf", "--out", "OUT.gguf"],
    ["eval", "run", "--tasks", "skills", "--out", "OUT"],
    *(["bench", name] for name in ("infer", "serve", "train", "quant")),
]


@pytest.fixture
def no_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvidia, "cards", nvidia.Cards)


def fill(command: list[str], tmp_path: Any) -> list[str]:
    return [text.replace("OUT", str(tmp_path / "out")) for text in command]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "no GPU found; use --device auto or cpu"), ("cuda:7", "no GPU found"), ("mps", "no Apple GPU")],
)
def test_a_missing_device_is_one_line(
    no_gpu: None, tmp_path: Any, capsys: Any, command: list[str], device: str, message: str
) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    assert main([*fill(command, tmp_path), "--device", device]) == 2
    error = capsys.readouterr().err
    assert f"--device {device}: " in error
    assert message in error
    assert error.rstrip("\n").count("\n") == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_unknown_device_is_one_line(tmp_path: Any, capsys: Any, command: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*fill(command, tmp_path), "--device", "gpu:0"])
    error = capsys.readouterr().err
    assert "--device: unknown device 'gpu:0' (known: auto, cpu, cuda, cuda:N, mps)" in error
    assert error.count("\n") == 1


def test_the_flag_is_the_same_everywhere() -> None:
    for verb, *rest in COMMANDS:
        parser = verb_parser(verb)
        parser = parser.below().get(rest[0], parser)
        (flag,) = [action for action in parser._actions if "--device" in action.option_strings]
        assert flag.default == "auto"
        assert "an NVIDIA GPU if PyTorch can use one" in (flag.help or "")


@pytest.mark.parametrize("page", ["chat", "generation"])
def test_the_demos_take_it(no_gpu: None, monkeypatch: Any, capsys: Any, page: str) -> None:
    from xverse.commands import demos

    monkeypatch.setattr("sys.argv", ["demo.py", "--port", "0", "--device", "cuda"])
    assert demos.main(page) == 2
    assert "--device cuda: no GPU found" in capsys.readouterr().err


def test_the_harness_takes_it(no_gpu: None) -> None:
    pytest.importorskip("lm_eval")
    from xverse.config import UserError
    from xverse.eval.harness import Harness

    with pytest.raises(UserError, match="--device cuda: no GPU found"):
        Harness(pretrained="nano", device="cuda")


def test_full_gpu_memory_is_one_line(monkeypatch: Any, capsys: Any) -> None:
    from xverse import cli

    def full(arguments: list[str]) -> int:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 10 GiB.")

    monkeypatch.setattr(cli, "_dispatch", full)
    assert main(["chat"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("xverse: CUDA out of memory. Tried to allocate 2.00 GiB; use --quantize")
    assert error.count("\n") == 1
