"""``python -m benchmarks NAME [options]``, from the root of the checkout: run one study or comparison.

The benchmarks of ``xverse bench`` are reached by their names too, and ``all`` runs those that it runs without
a name. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from xverse import cli
from xverse.bench.report import finish
from xverse.commands.bench import BENCHMARKS
from xverse.config import UserError, nearest

# name: (module, what it measures)
STUDIES = {
    "attention": ("studies.attention", "attention over the paged cache compared with its bounds"),
    "checkpoint": (
        "studies.checkpoint",
        "how long checkpoints stall a training run, and how long resuming takes",
    ),
    "composition": ("studies.composition", "random layouts and methods compared with one process's losses"),
    "data": (
        "studies.data",
        "preparing text: shards compared with the tokenizers library, the pipeline, its stages",
    ),
    "decoding": (
        "studies.decoding",
        "speculative decoding compared with plain decoding; the scheduler's share of a step",
    ),
    "finetune": ("studies.finetune", "fine-tuning against transformers' and trl's trainers; memory of QLoRA"),
    "finetune-quality": ("studies.finetune_quality", "held-out losses after fine-tuning, by method"),
    "documents": ("studies.documents", "time and memory of planning millions of documents"),
    "float8": ("studies.float8", "pretraining in FP8 against bfloat16: loss curves and speed; needs CUDA"),
    "footprint": ("studies.footprint", "memory and time of a quantised model from end to end"),
    "gptq": ("studies.gptq", "time of GPTQ on layers of a shape"),
    "gpu-check": ("gpu.check", "what a machine with an NVIDIA GPU decides; nine minutes at most"),
    "gpu-count": ("gpu.count", "launches and bytes of the 7B model on CUDA, counted without a GPU"),
    "grpo": ("studies.grpo", "GRPO compared with trl's GRPOTrainer"),
    "invariance": (
        "studies.invariance",
        "whether other requests change the bits of a reply, and the price of avoiding it",
    ),
    "kernels": ("studies.kernels", "the CPU kernels of each instruction set that this machine has"),
    "llamafactory": ("studies.llamafactory", "LLaMA-Factory's example files with a small model"),
    "load": ("studies.load", "peak memory while loading a model, compared with the size of its weights"),
    "parallel": ("studies.parallel", "peak memory of each process under each layout of two processes"),
    "plan": ("studies.plan", "the planner's cost model compared with published measurements, and its fit"),
    "quality-methods": ("studies.quality", "what every method of quantising costs, compared with upstream's"),
    "scale": ("studies.scale", "what a run of up to 1,024 processes costs its process 0, by simulation"),
    "schemas": ("studies.schemas", "public JSON schemas: how many compile, whether replies satisfy them"),
    "soak": ("studies.soak", "the server under mixed load and attacks: memory, blocks, errors, gaps"),
    "startup": ("studies.startup", "wall time of xverse --help and of a first answer, in fresh processes"),
    "survival": ("studies.survival", "kill -9 of random processes under torchrun: steps lost, recovery time"),
    "tokenizer": ("studies.tokenizer", "training a tokenizer compared with the tokenizers library's trainer"),
    "peers": ("peers.run", "the engine compared with llama.cpp and transformers"),
    "peers-serving": ("peers.serving", "the server compared with llama.cpp"),
    "peers-evaluation": ("peers.evaluation", "scoring MMLU compared with lm-evaluation-harness"),
}


def main(argv: Sequence[str]) -> int:
    """Run one study; returns the exit code."""
    name, *rest = argv or ["--help"]
    if name == "all":
        return cli.main(["bench"])
    if name in BENCHMARKS:
        return cli.main(["bench", *argv])
    if name in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [options]   (NAME --help for its options)\n\nnames:")
        for known, (_, text) in STUDIES.items():
            print(f"  {known:<17} {text}")
        print(f"  {', '.join(BENCHMARKS)}: as xverse bench; all: those in turn")
        return 0
    return cli.guarded(f"benchmarks {name}", lambda: _study(name, rest))


def _study(name: str, arguments: Sequence[str]) -> int:
    if name not in STUDIES:
        raise UserError(f"unknown name '{name}'{nearest(name, [*STUDIES, *BENCHMARKS])}")
    path, text = STUDIES[name]
    module = importlib.import_module(f"benchmarks.{path}")
    parser = cli.Parser(
        prog=f"benchmarks {name}",
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=cli.HelpFormatter,
    )
    module.arguments(parser)
    finish(module.run(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
