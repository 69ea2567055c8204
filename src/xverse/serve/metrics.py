"""Metrics for Prometheus, at ``/metrics``.

Where the meaning is the same as in vLLM, the name is vLLM's (``vllm:…``, and ``http_…`` for requests by
status), so that its dashboards and alerts work; the rest is named ``xverse_…``. All carry ``model_name``
except those of HTTP and of the process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from xverse.engine import Event, Request
from xverse.serve.runner import EngineRunner

prometheus_client.disable_created_metrics()

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 30)
_FIRST_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_REPLY_SECONDS = (0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960, 1920)
_HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """The metrics of one server, in a separate registry."""

    def __init__(self, runner: EngineRunner, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            every = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return every.labels(model)

        self._http = Counter(
            "http_requests",
            "HTTP requests; for a stream that failed, the status of its error; 499: the client left",
            ["handler", "method", "status"],
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time from a request's head to the end of its response",
            ["handler", "method"],
            buckets=_HTTP_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens").labels(model)
        self.queried_tokens = counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache"
        ).labels(model)
        self.cached_tokens = counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache"
        ).labels(model)
        self.succeeded = counter("vllm:request_success", "Finished replies", "finished_reason")
        self.failed = counter("xverse_reply_failures", "Replies that did not finish", "reason")
        self.first_token = histogram(
            "vllm:time_to_first_token_seconds",
            "Time from arrival of a request to its first token",
            _FIRST_SECONDS,
        )
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds", "Time between two tokens of a reply", _TOKEN_SECONDS
        )
        self.whole_reply = histogram(
            "vllm:e2e_request_latency_seconds", "Time from arrival to the last token", _REPLY_SECONDS
        )
        self.tokens_of_prompt = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a finished reply", _TOKENS
        )
        self.tokens_of_reply = histogram(
            "vllm:request_generation_tokens", "Generated tokens of a finished reply", _TOKENS
        )
        self.registry.register(_Engine(runner, model))
        ProcessCollector(registry=self.registry)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP request; ``handler`` is its route."""
        method = method if method in _METHODS else "other"
        self._http.labels(handler, method, str(status)).inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def reply(self, request: Request) -> ReplyMeter:
        return ReplyMeter(self, self._model, request)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class ReplyMeter:
    """Measures one reply; call ``event`` for each of its events and ``end`` once."""

    def __init__(self, metrics: Metrics, model: str, request: Request) -> None:
        self._metrics, self._model = metrics, model
        self._prompt, self._tokens = len(request.prompt_ids), 0
        self._begin = self._last = time.monotonic()

    def event(self, event: Event) -> None:
        now, metrics = time.monotonic(), self._metrics
        if event.error is None and self._tokens == 0:
            metrics.prompt_tokens.inc(self._prompt)
            metrics.queried_tokens.inc(self._prompt)
            metrics.cached_tokens.inc(event.cached_tokens)
        if event.token_id is None:  # of an embedding or a score
            return
        if self._tokens == 0:
            metrics.first_token.observe(now - self._last)
        else:
            metrics.between_tokens.observe(now - self._last)
        self._last = now
        self._tokens += 1

    def end(self, reason: str) -> None:
        """``reason``: the finish reason, or "cancelled", "timeout" or "error"."""
        if reason not in ("stop", "length"):
            self._metrics.failed.labels(self._model, reason).inc()
            return
        self._metrics.succeeded.labels(self._model, reason).inc()
        self._metrics.whole_reply.observe(time.monotonic() - self._begin)
        self._metrics.tokens_of_prompt.observe(self._prompt)
        self._metrics.tokens_of_reply.observe(self._tokens)


class _Engine:
    """The engine's state, read at collection time."""

    def __init__(self, runner: EngineRunner, model: str) -> None:
        self._runner, self._model = runner, model

    def collect(self) -> Iterator[Metric]:
        stats = self._runner.stats
        held = stats.blocks - stats.free_blocks - stats.idle_blocks
        for name, text, value in (
            ("vllm:num_requests_running", "Running requests", stats.running),
            ("vllm:num_requests_waiting", "Waiting requests", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Used share of the key-value cache, 1: full", held / stats.blocks),
            ("xverse_cache_blocks", "Blocks of the key-value cache", stats.blocks),
            ("xverse_cache_free_blocks", "Free blocks of the cache", stats.free_blocks),
            ("xverse_cache_prefix_blocks", "Blocks held by the prefix cache", stats.cached_blocks),
            ("xverse_ready", "Whether the server is ready", int(self._runner.ready())),
        ):
            yield self._of_model(GaugeMetricFamily(name, text, labels=["model_name"]), value)
        for name, text, value in (
            ("vllm:generation_tokens", "Generated tokens", self._runner.tokens),
            ("vllm:num_preemptions", "Preempted requests", stats.preemptions),
            ("vllm:spec_decode_num_draft_tokens", "Tokens proposed by speculation", stats.proposed_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Accepted proposed tokens", stats.accepted_tokens),
            ("xverse_engine_failures", "Exceptions in engine steps", self._runner.failures),
        ):
            yield self._of_model(CounterMetricFamily(name, text, labels=["model_name"]), value)

    def _of_model(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family
