"""Metrics for Prometheus, at ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from xverse.serve.runner import EngineRunner

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a separate registry."""

    def __init__(self, runner: EngineRunner) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "xverse_requests", "Requests by outcome", ["endpoint", "outcome"], registry=self.registry
        )
        self.prompt_tokens = Counter("xverse_prompt_tokens", "Prompt tokens", registry=self.registry)
        self.first_token = Histogram(
            "xverse_time_to_first_token_seconds",
            "Time from arrival of a request to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "xverse_inter_token_seconds", "Time between two tokens", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_Engine(runner))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine:
    """The engine's state, read at collection time."""

    def __init__(self, runner: EngineRunner) -> None:
        self._runner = runner

    def collect(self) -> Iterator[Metric]:
        stats = self._runner.stats
        for name, text, value in (
            ("running", "Running requests", stats.running),
            ("waiting", "Waiting requests", stats.waiting),
            ("cache_blocks", "Blocks of the key-value cache", stats.blocks),
            ("cache_free_blocks", "Free blocks of the cache", stats.free_blocks),
            ("cache_prefix_blocks", "Blocks held by the prefix cache", stats.cached_blocks),
            ("ready", "Whether the server is ready", int(self._runner.ready())),
        ):
            yield GaugeMetricFamily(f"xverse_{name}", text, value=value)
        for name, text, value in (
            ("generated_tokens", "Generated tokens", self._runner.tokens),
            ("engine_failures", "Exceptions in engine steps", self._runner.failures),
            ("preemptions", "Preempted requests", stats.preemptions),
            ("reused_tokens", "Prompt tokens found in the prefix cache", stats.reused_tokens),
            ("proposed_tokens", "Tokens proposed by speculation", stats.proposed_tokens),
            ("accepted_tokens", "Proposed tokens that were accepted", stats.accepted_tokens),
        ):
            yield CounterMetricFamily(f"xverse_{name}", text, value=value)
