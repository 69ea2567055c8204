"""One file for each benchmark."""

from __future__ import annotations

from xverse.eval.benchmark import Benchmark
from xverse.eval.benchmarks import agieval, ceval, gaokao_bench, gaokao_english, mmlu

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK for module in (mmlu, ceval, agieval, gaokao_bench, gaokao_english)
}
