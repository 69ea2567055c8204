"""A tiny prepared folder, and recipes for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import forkserver
from xverse.data.feed import PretrainFeed
from xverse.data.mixture import MixtureConfig
from xverse.data.prepare.pipeline import PrepareRecipe, prepare
from xverse.model import XverseConfig, XverseForCausalLM, init_weights
from xverse.train import Hooks, TrainConfig, fit

LENGTH = 48
CLI = "import sys\nfrom xverse.cli import main\nsys.exit(main())\n"


class Torchrun(forkserver.Popen):
    """A torchrun that is under way; what it and its processes print is in a file."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with log.open("wb") as file:
            super().__init__(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def communicate(self, input: None = None, timeout: float | None = 500) -> tuple[str, None]:
        """What it printed, stdout and stderr, once it has ended."""
        self.wait(timeout)
        return self.said(), None

    def kill(self) -> None:
        """It and its processes, which are of one session."""
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                *_, session = file.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid:
                    os.kill(int(file.parent.name), signal.SIGKILL)


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., Torchrun]]:
    """``torchrun(2, recipe, "key=value", restarts=3)`` begins ``xverse pretrain`` in two processes;
    ``script=text`` takes a program of the test's instead."""
    begun: list[Torchrun] = []

    def start(
        processes: int,
        *arguments: str,
        restarts: int = 0,
        script: str = "",
        environment: dict[str, str] | None = None,
    ) -> Torchrun:
        file = tmp_path / f"program-{len(begun)}.py"
        file.write_text(script or CLI)
        options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--start-method=fork"]
        verb = [] if script else ["pretrain"]
        command = ["--standalone", *options, "--run-path", str(file), *verb, *arguments]
        begun.append(Torchrun(command, tmp_path / f"log-{len(begun)}.txt", environment or {}))
        return begun[-1]

    yield start
    for one in begun:
        if one.poll() is None:
            one.kill()
            one.wait()


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """All tensors of a checkpoint that one process wrote: ``model.NAME`` and ``optimizer.KEY.NAME``."""

    def read(checkpoint: Path) -> dict[str, torch.Tensor]:
        (file,) = checkpoint.glob("*.safetensors")
        return load_file(file)

    return read


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """A folder as ``xverse data prepare`` makes it: 100 documents of ``en`` and ``zh``, a tenth held out."""
    corpus = tmp_path_factory.mktemp("corpus")
    texts = ["\n".join((tiny_texts * 3)[i : i + 2]) + f" {i}" for i in range(100)]
    lines = [json.dumps({"text": text, "lang": ("en", "zh")[i % 2]}) for i, text in enumerate(texts)]
    (corpus / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareRecipe(corpus, out, vocab_size=600, valid_share=0.1))
    return out


@pytest.fixture(scope="session")
def feed(prepared: Path) -> PretrainFeed:
    return PretrainFeed(prepared, MixtureConfig(), LENGTH, seed=0)


@pytest.fixture(scope="session")
def tiny_shape(feed: PretrainFeed) -> dict[str, int]:
    """Keys of an ``XverseConfig`` that fits the prepared folder."""
    return {
        "vocab_size": feed.tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }


@pytest.fixture
def write_recipe(tmp_path: Path, prepared: Path, tiny_shape: dict[str, int]) -> Callable[..., Path]:
    """``write_recipe(steps=20, …)`` writes a recipe of a run in ``tmp_path/run``; keys go to ``train``."""

    def write(top: dict[str, Any] | None = None, **train: Any) -> Path:
        recipe = {
            "shape": tiny_shape,
            "data": str(prepared),
            "out": str(tmp_path / "run"),
            "sequence_length": LENGTH,
            "train": {"batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 5, "preflight": "off", **train},
            **(top or {}),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write


@pytest.fixture
def fit_tiny(feed: PretrainFeed, tiny_shape: dict[str, int]) -> Callable[..., XverseForCausalLM]:
    """``fit_tiny(out, steps=20, …)`` trains the tiny model in ``out`` by ``fit`` alone, in float32."""

    def run(
        out: Path, *, validate: Any = None, identity: dict[str, Any] | None = None, **settings: Any
    ) -> XverseForCausalLM:
        defaults = {
            "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 5, "dtype": "float32", "preflight": "off",
        }  # fmt: skip
        config = TrainConfig(**{**defaults, **settings})
        model = XverseForCausalLM(XverseConfig(**tiny_shape))
        init_weights(model, seed=0)
        fit(model, feed.batch, config, out, hooks=Hooks(validate=validate), identity=identity)
        return model

    return run
