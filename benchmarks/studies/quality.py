"""The quality of quantised models: every method compared with upstream's, with and without outlier channels.

Quantised models run as in production, with int8 activations and this machine's kernels. Methods are judged
by their rise in perplexity as a share of that of upstream's method (``rtn-row``). Outlier channels are added
to the source without changing its function: some weights of each norm are divided by s, and the columns that
read them are multiplied by s.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xverse.bench.options import add_threads, positive
from xverse.bench.quality import Reference, read_rows, read_texts
from xverse.bench.report import Row, show
from xverse.formats import load_model, load_tokenizer, resolve
from xverse.formats.quantize import build
from xverse.hardware import cores, using_threads
from xverse.kernels.native import kernel_name
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.quant.parity import ParityReport
from xverse.quant.quantizer import HEAD, NORM, Quantizer
from xverse.quant.settings import Method, QuantSettings
from xverse.quant.text import parity_tokens
from xverse.values import add_model

LENGTH = 256  # tokens per row, as in the training of mini and nano
SEED, SHARE, FACTORS = 0, 1 / 64, (8.0, 64.0)  # of outlier channels: seed, share of all channels, range of s
# Maximum at 4 bits, as a share of rtn-row's rise in perplexity; maximum rise at 8 bits.
TARGETS = {("rtn", False): 0.70, ("gptq", False): 0.40, ("rtn", True): 0.25, ("gptq", True): 0.15}
TARGET_8 = 0.001
_ROWS_AT_ONCE = 16


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="NAME=PATH,…",
        help="text sets: files (.txt, .jsonl, token shards) or folders (default: the package's own text)",
    )
    parser.add_argument(
        "--calibration", metavar="PATH,…", help="calibration text for gptq (default: gptq is left out)"
    )
    parser.add_argument("--tokens", type=positive, default=32768, metavar="N", help="tokens of each text set")
    parser.add_argument(
        "--calibration-tokens", type=positive, default=65536, metavar="N", help="tokens of calibration text"
    )
    parser.add_argument(
        "--group-size", type=positive, default=128, metavar="N", help="weights that share a scale"
    )
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=[4, 8], default=[4, 8], metavar="4|8", help="bits of a weight"
    )
    add_threads(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    model: str = "nano",
    texts: Sequence[str] = (),
    calibration: str | None = None,
    tokens: int = 32768,
    calibration_tokens: int = 65536,
    threads: int | None = None,
    bits: Sequence[int] = (4, 8),
    group_size: int = 128,
) -> dict[str, Any]:
    """Measure, print a table, return the figures.

    Each of ``texts`` is ``NAME=PATH,PATH…``; a path is a text file, a ``.jsonl``, a token shard, or a folder
    of these, whose parts contribute equal shares of ``tokens``. Default: the package's own parity text.
    ``calibration``, of ``calibration_tokens``, is given likewise without a name; without it ``gptq`` is left
    out.
    """
    path = resolve(model)
    tokenizer = load_tokenizer(path)
    if texts:
        sets = read_texts(tokenizer, texts, tokens)
    else:
        sets = {"parity text": parity_tokens(tokenizer, 0)}
    learning = read_rows(tokenizer, calibration, calibration_tokens) if calibration else None
    methods: list[Method] = ["rtn-row", "rtn"]
    if learning is not None:
        methods.append("gptq")
    with using_threads(threads or cores().usable), torch.no_grad():
        source = load_model(path, torch.float32)
        state = source.state_dict()
        references = {name: Reference(source, rows) for name, rows in sets.items()}
        results = []
        for outliers in (False, True):
            tensors = inject(state, source.config) if outliers else state
            for width in bits:
                for method in methods:
                    settings = QuantSettings(
                        bits=width, method=method, group_size=group_size, embedding_bits=16
                    )
                    quantized = quantize(source.config, tensors, settings, learning)
                    for name, reference in references.items():
                        figures = reference.compare(quantized)
                        results.append(Result(method, width, outliers, name, figures))
    rows = [Row(**row) for row in _rows(results)]
    show(f"Quality of quantised {model}, kernels {kernel_name()}", rows)
    return {
        "bench": "quality",
        "model": model,
        "kernels": kernel_name(),
        "tokens": {name: reference.tokens.numel() for name, reference in references.items()},
        "calibration_tokens": learning.numel() if learning is not None else None,
        "outliers": {"seed": SEED, "share_of_channels": SHARE, "factors": FACTORS},
        "results": [result.to_json(results) for result in results],
    }


@dataclass(frozen=True)
class Result:
    """The figures of one method on one text."""

    method: str
    bits: int
    outliers: bool
    text: str
    figures: ParityReport

    def share(self, results: Sequence[Result]) -> float | None:
        """The rise in perplexity as a share of rtn-row's; None if perplexity did not rise with rtn-row."""
        for other in results:
            same = (other.bits, other.outliers, other.text) == (self.bits, self.outliers, self.text)
            if same and other.method == "rtn-row" and (other.figures.delta_perplexity or 0) > 0:
                return (self.figures.delta_perplexity or 0) / (other.figures.delta_perplexity or 1)
        return None

    def bound(self, results: Sequence[Result]) -> str:
        """The target, and whether it is met."""
        share = self.share(results)
        target = TARGETS.get((self.method, self.outliers))
        if self.bits == 8:
            if self.method == "rtn-row":
                return ""
            met = (self.figures.delta_perplexity or 0) <= TARGET_8
            return f"target ≤ +{TARGET_8:.1%}: {'met' if met else 'missed'}"
        if target is None:
            return ""
        if share is None:
            return f"target ≤ {target:.0%} of rtn-row's: not measured (no rise with rtn-row)"
        return f"target ≤ {target:.0%} of rtn-row's: {share:.0%}, {'met' if share <= target else 'missed'}"

    def to_json(self, results: Sequence[Result]) -> dict[str, Any]:
        figures = self.figures
        return {
            "method": self.method,
            "bits": self.bits,
            "outliers": self.outliers,
            "text": self.text,
            "perplexity_source": figures.perplexity_source,
            "delta_perplexity": figures.delta_perplexity,
            "noise": figures.noise,
            "share_of_rtn_row": self.share(results),
            "kl": figures.kl,
            "top1": figures.top1,
        }


def _rows(results: Sequence[Result]) -> Iterator[dict[str, str]]:
    for result in results:
        figures = result.figures
        outliers = ", outlier channels" if result.outliers else ""
        yield {
            "figure": f"int{result.bits} {result.method}{outliers}, {result.text}",
            "result": f"perplexity {figures.delta_perplexity or 0:+.3%} ± {figures.noise or 0:.3%}, "
            f"KL {figures.kl or 0:.2e}, same first choice {figures.top1 or 0:.1%}",
            "bound": result.bound(results),
        }


def quantize(
    config: XverseConfig, state: Mapping[str, Tensor], settings: QuantSettings, calibration: Tensor | None
) -> XverseForCausalLM:
    """A model with quantised layers that computes in float32."""
    run = Quantizer(
        config,
        lambda prefix: {name: tensor for name, tensor in state.items() if name.startswith(prefix)},
        settings,
        calibration=calibration,
    )
    return build(config, run.tensors(), torch.float32)


def inject(state: Mapping[str, Tensor], config: XverseConfig, seed: int = SEED) -> dict[str, Tensor]:
    """Weights of the same function with random outlier channels in each norm; log s is uniform."""
    changed = dict(state)
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(SHARE * config.hidden_size))
    low, high = map(math.log, FACTORS)
    behind = {NORM: [HEAD]}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}."
        behind[f"{layer}input_layernorm.weight"] = [f"{layer}self_attn.{x}_proj.weight" for x in "qkv"]
        behind[f"{layer}post_attention_layernorm.weight"] = [
            f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up")
        ]
    for norm, weights in behind.items():
        factors = torch.ones(config.hidden_size)
        chosen = torch.randperm(config.hidden_size, generator=generator)[:count]
        factors[chosen] = (low + (high - low) * torch.rand(count, generator=generator)).exp()
        changed[norm] = state[norm] / factors
        for name in weights:
            changed[name] = state[name] * factors
    return changed
