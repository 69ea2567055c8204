"""Held-out losses of a base model before and after fine-tuning, by method and data set.

All weights, LoRA and QLoRA see the same instructions in the same order; DPO trains an adapter of its own on
the fully tuned model. Curves and a table go to a folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.common import run_finetune
from xverse.bench.options import add_threads, positive
from xverse.bench.report import Row, at_most, count_threads, show
from xverse.config import UserError
from xverse.finetune.encode import Example, load_data
from xverse.finetune.settings import read_settings
from xverse.hardware import cores
from xverse.log import notice

# Below --data, as published; missing ones are skipped.
INSTRUCTIONS = {
    "alpaca_en": "alpaca_data_en_52k.json.gz",
    "alpaca_zh": "alpaca_zh.json.gz",
    "alpaca_en_demo": "llama-factory/alpaca_en_demo.json",
    "alpaca_zh_demo": "llama-factory/alpaca_zh_demo.json",
}
PAIRS = ("llama-factory/dpo_en_demo.json", "llama-factory/dpo_zh_demo.json")
HELD_OUT = 100  # per data set, and of the pairs
MOST = 4000  # per data set; a run of this size does not reach more
LENGTH, ROWS = 512, 4  # tokens of a packed row, rows per step
LORA = {"finetuning_type": "lora", "lora_rank": "64", "learning_rate": "1e-3"}
METHODS: dict[str, dict[str, str]] = {
    "full": {"finetuning_type": "full", "learning_rate": "3e-4"},
    "lora": LORA,
    "qlora": {**LORA, "quantization_bit": "4"},
}
LORA_TARGET, QLORA_TARGET = 1.05, 1.03  # maximum ratio to the held-out loss of full fine-tuning, and of LoRA


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder of instructions")
    parser.add_argument("--base", default="nano", metavar="M", help="the model to start from")
    parser.add_argument("--out", required=True, metavar="DIR", help="an empty folder for models and curves")
    parser.add_argument("--steps", type=positive, default=6, metavar="N", help="steps of each training")
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    data, out = (Path(path).expanduser().resolve() for path in (args.data, args.out))
    return measure(data, args.base, out, args.steps, args.threads or cores().usable)


def measure(data: Path, base: str, out: Path, steps: int, threads: int) -> dict[str, Any]:
    """Train with each method for ``steps`` steps, and DPO for 1.5 times as many. Writes to ``out``.

    Raises UserError where ``data`` holds none of the sets, or where ``out`` holds files already.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    names = _split(data, out)
    pairs = _pairs(data, out)
    common = {
        "model_name_or_path": base, "do_train": "true", "output_dir": "", "max_steps": str(steps),
        "per_device_train_batch_size": str(ROWS), "cutoff_len": str(LENGTH), "lr_scheduler_type": "cosine",
        "warmup_steps": "0.1", "max_grad_norm": "1.0", "logging_steps": "5", "plot_loss": "true",
        "save_strategy": "no", "eval_strategy": "steps", "eval_on_start": "true",
        "eval_steps": str(max(1, steps // 6)), "per_device_eval_batch_size": "16",
    }  # fmt: skip
    losses = {"base": _held_out(base, None, 0, out, names)}
    for method, flags in METHODS.items():
        notice(f"finetune: {method}, {steps} steps")
        files = ",".join(str(out / f"{name}.train.json") for name in names)
        held = ",".join(str(out / f"{name}.valid.json") for name in names)
        here = {**common, **flags, "dataset": files, "eval_dataset": held, "packing": "true"}
        run_finetune({**here, "output_dir": str(out / method)}, threads)
        model, adapter = (str(out / "full"), None) if method == "full" else (base, out / method)
        losses[method] = _held_out(model, adapter, 4 if method == "qlora" else 0, out, names)
    preferences: dict[str, Any] = {}
    if pairs:
        notice("finetune: dpo")
        longer = steps * 3 // 2
        flags = {"finetuning_type": "lora", "stage": "dpo", "learning_rate": "5e-4"}
        flags |= {"max_steps": str(longer), "eval_steps": str(max(1, longer // 6))}
        flags |= {"dataset": str(pairs), "val_size": str(HELD_OUT), "output_dir": str(out / "dpo")}
        flags |= {"model_name_or_path": str(out / "full")}
        flags |= {"per_device_eval_batch_size": "4", "lora_rank": "16"}
        done = run_finetune({**common, **flags}, threads)
        preferences = {key: done["metrics"][f"eval_{key}"] for key in ("margin", "accuracy", "loss")}
    ratios = {
        "lora / full": _mean(losses["lora"]) / _mean(losses["full"]),
        "qlora / lora": _mean(losses["qlora"]) / _mean(losses["lora"]),
    }
    result = {
        "bench": "finetune-quality",
        "base": base,
        "steps": steps,
        "threads": threads,
        "losses": losses,
        "ratios": ratios,
        "dpo": preferences,
        "curves": sorted(str(path.relative_to(out)) for path in out.glob("*/loss.png")),
    }
    show(f"held-out loss after {steps} steps from {base}, {count_threads(threads)}", _rows(result))
    (out / "result.json").write_text(json.dumps(result, indent=1))
    return result


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _rows(result: dict[str, Any]) -> Iterator[Row]:
    base = result["losses"]["base"]
    for method, losses in result["losses"].items():
        for name, loss in losses.items():
            lower = "below the base's: " + ("yes" if loss < base[name] else "no") if method != "base" else ""
            yield Row(f"{method}, {name}", f"{loss:.4f} nats, perplexity {math.exp(loss):.2f}", lower)
    for (name, ratio), target in zip(result["ratios"].items(), (LORA_TARGET, QLORA_TARGET), strict=True):
        yield Row(name, f"{ratio:.4f} ×", at_most(target, ratio, "×"))
    if result["dpo"]:
        margin = result["dpo"]["margin"]
        grown = "above the reference's 0: " + ("yes" if margin > 0 else "no")
        yield Row("dpo, margin on held-out pairs", f"{margin:.4f}", grown)
        yield Row("dpo, chosen preferred", f"{result['dpo']['accuracy']:.1%}")


def _read(path: Path) -> list[Any]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(raw.decode("utf-8"))


def _split(data: Path, out: Path) -> list[str]:
    """Write NAME.train.json and NAME.valid.json to ``out``, with disjoint instructions; returns the names."""
    names = []
    for name, place in INSTRUCTIONS.items():
        path = next((path for path in (data / place, data / Path(place).name) if path.is_file()), None)
        if path is None:
            continue
        items = [item for item in _read(path) if item.get("output", "").strip()]
        random.Random(0).shuffle(items)
        held, instructions = items[:HELD_OUT], {item["instruction"] for item in items[:HELD_OUT]}
        kept = [item for item in items[HELD_OUT:] if item["instruction"] not in instructions][:MOST]
        (out / f"{name}.train.json").write_text(json.dumps(kept, ensure_ascii=False))
        (out / f"{name}.valid.json").write_text(json.dumps(held, ensure_ascii=False))
        names.append(name)
    if not names:
        raise UserError(f"{data}: none of {', '.join(INSTRUCTIONS.values())} was found")
    return names


def _pairs(data: Path, out: Path) -> Path | None:
    items = [item for place in PAIRS if (data / place).is_file() for item in _read(data / place)]
    random.Random(0).shuffle(items)
    if items:
        (out / "pairs.json").write_text(json.dumps(items, ensure_ascii=False))
    return out / "pairs.json" if items else None


@torch.no_grad()
def _held_out(model: str, adapter: Path | None, bits: int, out: Path, names: list[str]) -> dict[str, float]:
    """Mean loss in nats per token, by data set."""
    from transformers import AutoModelForCausalLM

    from xverse.finetune.trainer import row_of
    from xverse.formats import load_tokenizer, resolve
    from xverse.model import IGNORE

    source = resolve(model)
    tokenizer = load_tokenizer(source)
    network: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if bits:
        network.quantize(bits)
    if adapter is not None:
        from peft import PeftModel

        from xverse.formats.adapters import peft_config

        network = PeftModel.from_pretrained(network, str(adapter), config=peft_config(network, adapter))
    network.eval()
    losses = {}
    for name in names:
        values = {"model_name_or_path": model, "dataset": str(out / f"{name}.valid.json"), "do_train": True}
        settings = read_settings(
            {**values, "output_dir": "-", "cutoff_len": LENGTH}, "benchmarks finetune-quality"
        )
        examples: list[Example] = load_data(settings, tokenizer, LENGTH, quiet=True).train
        total, count = 0.0, 0
        for start in range(0, len(examples), 8):
            batch = row_of(examples[start : start + 8], tokenizer.pad_id)
            del batch["names"]
            total += network(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss.item()
            count += int((batch["labels"] != IGNORE).sum())
        losses[name] = total / count
    return losses
