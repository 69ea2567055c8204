"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from xverse.serve.runner import EngineRunner

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, runner: EngineRunner) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "xverse_requests", "Requests by how they ended", ["endpoint", "outcome"], registry=self.registry
        )
        self.prompt_tokens = Counter("xverse_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.first_token = Histogram(
            "xverse_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "xverse_inter_token_seconds", "Between two tokens", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_Engine(runner))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine:
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, runner: EngineRunner) -> None:
        self._runner = runner

    def collect(self) -> Iterator[Metric]:
        stats = self._runner.stats
        for name, text, value in (
            ("running", "Requests that run", stats.running),
            ("waiting", "Requests that wait", stats.waiting),
            ("cache_blocks", "Blocks of the key-value cache", stats.blocks),
            ("cache_free_blocks", "Blocks that nobody holds", stats.free_blocks),
            ("cache_prefix_blocks", "Blocks that the prefix cache holds", stats.cached_blocks),
            ("ready", "Whether requests are answered", int(self._runner.ready())),
        ):
            yield GaugeMetricFamily(f"xverse_{name}", text, value=value)
        for name, text, value in (
            ("generated_tokens", "Tokens generated", self._runner.tokens),
            ("engine_failures", "Exceptions in a step", self._runner.failures),
            ("preemptions", "Requests that had to give up their cache", stats.preemptions),
            ("reused_tokens", "Tokens of prompts found in the prefix cache", stats.reused_tokens),
            ("proposed_tokens", "Tokens guessed", stats.proposed_tokens),
            ("accepted_tokens", "Guesses that were right", stats.accepted_tokens),
        ):
            yield CounterMetricFamily(f"xverse_{name}", text, value=value)
