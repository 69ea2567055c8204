"""LLaMA-Factory's example files, each run here with a small model, or ending in one line that says why.

``FOLDER`` is a checkout of LLaMA-Factory (https://github.com/hiyouga/LLaMA-Factory): all YAML files below its
``examples`` are tried on its ``data``. Replaced in each are the model and its template, the output folder and
what makes a run long (steps, examples, lengths); without a GPU also the 16-bit types.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from xverse.config import UserError, read_yaml
from xverse.finetune.run import run_finetuning
from xverse.finetune.settings import read_settings
from xverse.formats import ModelDirectory, save_hf
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.model.transformer import init_weights

TIMEOUT = 600  # seconds of one example


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a checkout of LLaMA-Factory")
    parser.add_argument("--model", metavar="M", help="model (default: two random layers, nano's tokenizer)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each run")


def run(args: argparse.Namespace) -> dict[str, Any]:
    files = sorted((args.folder / "examples").rglob("*.y*ml"))
    if not files:
        raise UserError(f"{args.folder}: no YAML files below examples")
    counts = {"ran": 0, "refused": 0, "no run": 0, "failed": 0}
    print("| example | outcome |\n|---|---|")
    with tempfile.TemporaryDirectory(prefix="xverse-study-") as temporary:
        model = args.model or str(_small_model(Path(temporary) / "model"))
        for number, file in enumerate(files):
            out = Path(temporary) / f"out-{number}"
            kind, line = _outcome(file, args.folder, model, out, args.steps)
            counts[kind] += 1
            print(f"| {file.relative_to(args.folder / 'examples')} | {kind}: {line} |", flush=True)
    return {"examples": len(files), **counts}


def _small_model(path: Path) -> Path:
    tokenizer = ModelDirectory.named("nano").tokenizer
    config = XverseConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    save_hf(model, tokenizer, path, torch.float32)
    return path


def changed(values: dict[str, Any], folder: Path, model: str, out: Path, steps: int) -> dict[str, Any]:
    """The values of an example with a small model, local paths and a short run."""
    values = {**values, "model_name_or_path": model, "output_dir": str(out), "template": "default"}
    values |= {"max_steps": steps, "max_samples": 12, "cutoff_len": 256, "keep_placeholders": True}
    values |= {"logging_steps": 1, "save_strategy": "no", "preprocessing_num_workers": None}
    values |= {"dataloader_num_workers": 0, "gradient_accumulation_steps": 1}
    values.setdefault("dataset_dir", str(folder / "data"))
    if values.get("eval_strategy") or values.get("evaluation_strategy"):
        values["eval_steps"] = steps
    if values.get("deepspeed"):
        values["deepspeed"] = str(folder / str(values["deepspeed"]))
    if not torch.cuda.is_available():
        values |= {key: None for key in ("bf16", "fp16", "pure_bf16") if values.get(key)}
        values["pure_bf16"] = False
    return values


def _outcome(file: Path, folder: Path, model: str, out: Path, steps: int) -> tuple[str, str]:
    try:
        values = read_yaml(file)
    except UserError as error:
        return "no run", str(error).replace(str(file), file.name)
    if "model_name_or_path" not in values:
        return "no run", f"no model_name_or_path (keys: {', '.join(map(str, values))[:80]} …)"
    values = changed(values, folder, model, out, steps)
    # In a process of its own: what transformers, DeepSpeed and peft leave behind must not reach the next.
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(values, file.name, sending))
    process.start()
    sending.close()
    try:
        if not receiving.poll(TIMEOUT):
            process.kill()
            return "failed", f"no end after {TIMEOUT} s"
        return receiving.recv()
    except EOFError:
        return "failed", "the process ended without a result"
    finally:
        process.join()


def _try(values: dict[str, Any], name: str, sending: Any) -> None:
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            settings = read_settings(yaml.safe_load(yaml.safe_dump(values)), name)
            run_finetuning(settings)
        lines = (settings.output_dir / "metrics.jsonl").read_text().splitlines()
        losses = [record["loss"] for line in lines if "loss" in (record := json.loads(line))]
        sending.send(("ran", f"loss {losses[0]:.3f} → {losses[-1]:.3f}"))
    except UserError as error:
        sending.send(("refused", str(error)))
    except BaseException as error:
        sending.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
