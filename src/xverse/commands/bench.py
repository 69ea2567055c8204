"""``xverse bench [NAME]``: measure speed and memory on this machine; the last line of stdout is JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from xverse.config import UserError

# Of `xverse bench` alone, in this order; each with its own defaults.
ALL = ("startup", "infer", "train", "checkpoint", "survival", "quant", "quality", "load")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Without a name: all of them in turn. The last line of stdout is one JSON object."
    names = parser.add_subparsers(dest="name", metavar="|".join(ALL))

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return names.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)

    add("startup", "wall time of xverse --help and of a first answer, in fresh processes")

    infer = add("infer", "prefill and decode speed beside the measured memory bandwidth")
    which = infer.add_mutually_exclusive_group()
    which.add_argument("--model", default="nano", metavar="M", help="nano, a model directory or a hub id")
    which.add_argument("--shape", metavar="S", help="a named shape with random weights, such as 7b")
    infer.add_argument("--prompt-tokens", type=positive, default=512, metavar="N", help="length of a prompt")
    infer.add_argument("--new-tokens", type=positive, default=128, metavar="N", help="timed steps")
    infer.add_argument("--batch", type=positive, default=1, metavar="N", help="requests at once")
    infer.add_argument("--rounds", type=positive, default=3, metavar="N", help="of which medians are taken")
    infer.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: as chat does)")
    infer.add_argument("--quantize", choices=["int8", "int4"], help="quantise the weights first")
    infer.add_argument(
        "--part",
        choices=["speed", "speculation", "scheduler"],
        default="speed",
        help="speculation: forced replies of a shape, real ones of a model; scheduler: what a step of 64 "
        "sequences spends outside the model",
    )
    infer.add_argument("--draft", metavar="M", help="a model that guesses, in --part speculation")
    infer.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="type of the weights (default: as chat does)"
    )

    serve = add("serve", "the server under load, beside the engine alone")
    serve.add_argument("--model", default="nano", metavar="M", help="nano, a model directory or a hub id")
    serve.add_argument("--quantize", choices=["int8", "int4"], help="quantise the weights first")
    serve.add_argument("--clients", type=positive, default=8, metavar="N", help="streams at once")
    serve.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="length of a prompt")
    serve.add_argument("--new-tokens", type=positive, default=128, metavar="N", help="of each stream")
    serve.add_argument("--rounds", type=positive, default=3, metavar="N", help="of which medians are taken")
    serve.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: as chat does)")

    soak = add("soak", "the server under mixed load, clients that hang up among it: memory, blocks, errors")
    soak.add_argument("--model", default="nano", metavar="M", help="nano, a model directory or a hub id")
    soak.add_argument("--quantize", choices=["int8", "int4"], help="quantise the weights first")
    soak.add_argument("--minutes", type=float, default=20.0, metavar="T", help="how long (%(default)s)")
    soak.add_argument("--clients", type=positive, default=16, metavar="N", help="at once (%(default)s)")
    soak.add_argument("--leaving", type=float, default=0.3, metavar="P", help="share of them that hang up")
    soak.add_argument("--seed", type=int, default=0, metavar="N")
    soak.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: as chat does)")

    train = add("train", "pretraining speed and memory against transformers' Llama under its Trainer")
    train.add_argument("--shape", default="mini", metavar="S", help="a named shape")
    train.add_argument(
        "--vocabulary",
        type=positive,
        metavar="V",
        help="entries (default: the shape's; mini: 8192 and 100534)",
    )
    train.add_argument("--batch-size", type=positive, default=8, metavar="N", help="sequences per step")
    train.add_argument("--sequence-length", type=positive, default=512, metavar="N", help="tokens of each")
    train.add_argument("--steps", type=positive, default=12, metavar="N", help="timed steps of each side")
    train.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all usable)")

    finetune = add("finetune", "fine-tuning against transformers' and trl's trainers, QLoRA's memory, losses")
    finetune.add_argument("--part", choices=["peers", "memory", "quality"], default="peers")
    finetune.add_argument(
        "--data", metavar="PATH", help="alpaca's file; in quality the folder of instructions"
    )
    finetune.add_argument("--shape", metavar="S", help="a named shape (peers: mini; memory: 7b)")
    finetune.add_argument("--vocabulary", type=positive, metavar="V", help="in peers (default: XVERSE-7B's)")
    finetune.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="rows of a step (peers)"
    )
    finetune.add_argument(
        "--sequence-length", type=positive, default=512, metavar="N", help="tokens of a row"
    )
    finetune.add_argument("--steps", type=positive, default=6, metavar="N", help="of each training")
    finetune.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="of which medians are taken"
    )
    finetune.add_argument("--contenders", nargs="+", metavar="NAME", help="some of those of peers")
    finetune.add_argument("--base", default="nano", metavar="M", help="what quality begins with")
    finetune.add_argument("--out", metavar="DIR", help="of quality's files; where memory makes weights")
    finetune.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all usable)")

    parallel = add("parallel", "peak memory of each process under each layout of two processes")
    parallel.add_argument("--shape", default="mini", metavar="S", help="a named shape")
    parallel.add_argument("--batch-size", type=positive, default=4, metavar="N", help="sequences per step")
    parallel.add_argument(
        "--sequence-length", type=positive, default=2048, metavar="N", help="tokens of each"
    )

    float8 = add("float8", "pretraining with FP8 matrices beside bfloat16: loss curves and speed; needs CUDA")
    float8.add_argument("--data", required=True, metavar="DIR", help="a folder that xverse data prepare made")
    float8.add_argument("--shape", default="mini", metavar="S", help="a named shape")
    float8.add_argument("--steps", type=positive, default=300, metavar="N", help="of each training")
    float8.add_argument("--batch-size", type=positive, default=32, metavar="N", help="sequences per step")
    float8.add_argument(
        "--micro-batch-size", type=int, default=0, metavar="N", help="of them at a time (0: all)"
    )
    float8.add_argument("--sequence-length", type=positive, default=2048, metavar="N", help="tokens of each")
    float8.add_argument("--compile", action="store_true", help="compile the layers")

    scale = add("scale", "what a run of up to 1,024 processes costs its process 0, by simulation")
    scale.add_argument("--shape", default="7b", metavar="S", help="a named shape")
    scale.add_argument(
        "--ranks", type=positive, nargs="+", default=[16, 64, 256, 1024], metavar="N", help="made-up worlds"
    )
    scale.add_argument(
        "--threads", type=positive, nargs="+", default=[4, 8, 16, 32], metavar="N", help="real gloo contexts"
    )
    scale.add_argument(
        "--gathered",
        type=positive,
        default=256,
        metavar="N",
        help="most ranks for torch's own ways",
    )

    checkpoint = add("checkpoint", "how long checkpoints hold a training run, and how long resuming takes")
    checkpoint.add_argument("--shape", default="mini", metavar="S", help="a named shape")
    checkpoint.add_argument("--batch-size", type=positive, default=8, metavar="N", help="sequences per step")
    checkpoint.add_argument(
        "--sequence-length", type=positive, default=512, metavar="N", help="tokens of each"
    )
    checkpoint.add_argument("--steps", type=positive, default=120, metavar="N", help="of each run")
    checkpoint.add_argument("--every", type=positive, default=100, metavar="N", help="steps to a checkpoint")
    checkpoint.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all usable)")
    checkpoint.add_argument("--directory", metavar="DIR", help="where checkpoints go (default: $TMPDIR)")

    survival = add(
        "survival", "kill -9 of random processes under torchrun: steps lost, time to the next step"
    )
    survival.add_argument("--shape", default="nano", metavar="S", help="a named shape")
    survival.add_argument("--kills", type=positive, default=20, metavar="N")
    survival.add_argument("--processes", type=positive, default=2, metavar="N")
    survival.add_argument("--every", type=positive, default=5, metavar="N", help="steps to a checkpoint")
    survival.add_argument("--apart", type=positive, default=12, metavar="N", help="steps between two kills")
    survival.add_argument("--batch-size", type=positive, default=4, metavar="N", help="sequences per step")
    survival.add_argument("--sequence-length", type=positive, default=64, metavar="N", help="tokens of each")
    survival.add_argument("--seed", type=int, default=0, metavar="N", help="of whom to kill, and when")

    quant = add("quant", "INT4, INT8 and bfloat16 kernels beside their bounds; memory of a quantised model")
    quant.add_argument("--shape", default="7b", metavar="S", help="a named shape")
    parts = ["matmul", "attention", "memory", "gptq"]
    quant.add_argument("--part", choices=parts, help="one part (default: all)")
    quant.add_argument("--rounds", type=positive, default=5, metavar="N", help="timed passes of each product")
    quant.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all usable)")
    quant.add_argument("--directory", metavar="DIR", help="where weights are made (default: $TMPDIR)")

    quality = add(
        "quality", "what quantising costs: every method against upstream's, with outlier channels too"
    )
    quality.add_argument("--model", default="nano", metavar="M", help="nano, a model directory or a hub id")
    quality.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="NAME=PATH,…",
        help="text sets: files (.txt, .jsonl, token shards) or folders (default: the package's own text)",
    )
    quality.add_argument("--calibration", metavar="PATH,…", help="what gptq learns from (default: no gptq)")
    quality.add_argument("--tokens", type=positive, default=32768, metavar="N", help="of each text set")
    quality.add_argument("--calibration-tokens", type=positive, default=65536, metavar="N")
    quality.add_argument("--group-size", type=positive, default=128, metavar="N")
    quality.add_argument("--bits", type=int, nargs="+", choices=[4, 8], default=[4, 8], metavar="4|8")
    quality.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all usable)")

    data = add("data", "preparing text: shards beside the tokenizers library, the whole pipeline, its stages")
    data.add_argument("--corpus", required=True, metavar="DIR", help="a folder of {language}.jsonl.gz")
    data_parts = ["encode", "pipeline", "duplicates", "language", "questions"]
    data.add_argument("--part", choices=data_parts, help="one part (default: all)")
    data.add_argument("--tokenizer", metavar="DIR", help="a tokenizer's folder (default: nano's)")
    data.add_argument("--data-dir", metavar="DIR", help="the folder of the benchmarks, to look for in text")
    data.add_argument("--directory", metavar="DIR", help="where shards are made (default: $TMPDIR)")
    data.add_argument("--workers", type=positive, metavar="N", help="processes (default: all usable cores)")
    data.add_argument(
        "--repeat", type=positive, default=1, metavar="N", help="of the corpus, in --part encode"
    )
    data.add_argument("--lines", type=positive, default=300, metavar="N", help="of each language")

    tokenizer = add(
        "tokenizer", "training a tokenizer: time and memory, beside the tokenizers library's trainer"
    )
    tokenizer.add_argument(
        "--corpus", required=True, metavar="DIR", help="text of many languages to make more of"
    )
    tokenizer.add_argument("--size-mb", type=positive, default=10_000, metavar="N", help="of the text made")
    tokenizer.add_argument("--prefix-mb", type=positive, default=500, metavar="N", help="that both train on")
    tokenizer.add_argument("--vocab-size", type=positive, default=100_534, metavar="N")
    tokenizer.add_argument("--limit-alphabet", type=positive, default=12_000, metavar="N")
    tokenizer.add_argument(
        "--memory-gb", type=float, default=3.0, metavar="GB", help="that ours stays within"
    )
    tokenizer.add_argument(
        "--peer-minutes", type=float, default=120.0, metavar="T", help="for the library's largest prefix"
    )
    tokenizer.add_argument("--seed", type=int, default=0, metavar="N")
    tokenizer.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all usable)")
    tokenizer.add_argument("--directory", metavar="DIR", help="where the text is made (default: $TMPDIR)")

    load = add("load", "peak memory while loading, against the size of the weights")
    load.add_argument("--shape", default="7b", metavar="S", help="a named shape")
    load.add_argument("--directory", metavar="DIR", help="where the weights are made (default: $TMPDIR)")


def positive(text: str) -> int:
    """A whole number of at least 1, as a flag's value."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from xverse.bench.report import finish

    options = dict(vars(args))
    name = options.pop("name")
    if name is None:
        finish(run_all({each: benchmark(each) for each in ALL}))
    else:
        finish(benchmark(name)(**options))
    return 0


def benchmark(name: str) -> Callable[..., dict[str, Any]]:
    """The measurement behind a name."""
    import importlib

    measure: Callable[..., dict[str, Any]] = importlib.import_module(f"xverse.bench.{name}").run
    return measure


def run_all(benchmarks: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Every measurement that this machine has room for; of the others, why they were not made."""
    results: dict[str, Any] = {}
    for name, measure in benchmarks.items():
        try:
            results[name] = measure()
        except UserError as error:
            results[name] = {"bench": name, "not_measured": str(error)}
            print(f"{name}\n  not measured: {error}")
        print()
    return {"bench": "all", "results": results}
