"""The time of GPTQ on layers of real shape, extrapolated to a whole model."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from xverse import hardware
from xverse.bench.options import add_shape, add_threads
from xverse.bench.report import Row, count_threads, need_memory, show
from xverse.config import choose
from xverse.log import notice
from xverse.model import SHAPES, XverseConfig, XverseForCausalLM
from xverse.quant.quantizer import Quantizer
from xverse.quant.settings import QuantSettings

LAYERS = 2
VOCABULARY = 4096  # embedding and head are not timed
TOKENS = (16, 512)  # calibration rows and their length


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "7b")
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = choose("shape", args.shape, SHAPES)
    threads = args.threads or hardware.cores().usable
    with hardware.using_threads(threads):
        result = measure(config)
    show(f"gptq {args.shape}, {count_threads(threads)}", rows(result))
    return {"bench": "gptq", "shape": args.shape, "threads": threads, **result}


def measure(config: XverseConfig) -> dict[str, Any]:
    """Quantise ``LAYERS`` layers of random weights of ``config``'s width to 4 bits."""
    small = dataclasses.replace(config, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    need_memory(8 * config.intermediate_size**2 + 40 * config.hidden_size * config.intermediate_size)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in XverseForCausalLM(small).state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def read(prefix: str) -> Mapping[str, Tensor]:
        tensors = {}
        for name, shape in shapes.items():
            if name.startswith(prefix):
                plain = torch.ones(shape) if len(shape) == 1 else torch.empty(shape)
                tensors[name] = (
                    plain if len(shape) == 1 else plain.normal_(0.0, 0.02, generator=generator)
                ).bfloat16()
        return tensors

    steps: list[tuple[str, float]] = []

    def step(name: str) -> None:
        notice(f"gptq: {name}")
        steps.append((name, time.perf_counter()))

    tokens = torch.randint(VOCABULARY, TOKENS, generator=torch.Generator().manual_seed(1))
    settings = QuantSettings(bits=4, method="gptq")
    quantizer = Quantizer(small, read, settings, calibration=tokens, progress=step)
    quantizer.uses_whole = False  # these two layers are measured as those of a 7B model are rounded
    for _ in quantizer.tensors():
        pass
    moments = dict(steps)
    first, last = moments["layer 1 of 2"], moments["head"]
    seconds = (last - first) / LAYERS
    return {
        "layers": LAYERS,
        "calibration_tokens": tokens.numel(),
        "seconds_per_layer": round(seconds, 1),
        "extrapolated_layers": config.num_hidden_layers,
        "extrapolated_s": round(seconds * config.num_hidden_layers),
        "peak_gb": round((hardware.process_memory("VmHWM") or 0) / 1e9, 2),
    }


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """The lines of the table."""
    tokens, seconds = result["calibration_tokens"], result["seconds_per_layer"]
    yield Row(f"gptq, {tokens:,} tokens, per layer", f"{seconds:.1f} s", f"mean of {result['layers']}")
    whole = result["extrapolated_s"] / 60
    yield Row("  all layers", f"{whole:.0f} min", f"extrapolated to {result['extrapolated_layers']} layers")
