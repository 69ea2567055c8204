"""From settings to a service that is ready to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.engine import Speculation
from xverse.engine.load import load_engine
from xverse.serve.grammar import Grammars
from xverse.serve.metrics import Metrics
from xverse.serve.runner import EngineRunner
from xverse.serve.service import Service


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """The model and its engine; the names are those of ``xverse serve``'s flags. ``sampling`` replaces the
    model's sampling parameters as defaults of requests."""

    model: str = "nano"
    tokenizer: str | None = None
    adapter: str | None = None
    quantize: str | None = None
    name: str | None = None
    max_batch: int = 64
    max_waiting: int = 256
    max_cache_tokens: int | None = None
    kv_dtype: str = "auto"
    speculate: bool = False
    timeout: float = 600.0
    threads: int | None = None
    device: str = "auto"
    sampling: Mapping[str, Any] = field(default_factory=dict)


def load_service(settings: ServiceSettings) -> Service:
    """Load the model. Raises UserError if it cannot be loaded or does not fit."""
    loaded = load_engine(
        settings.model,
        threads=settings.threads,
        quantize=settings.quantize,
        tokenizer=settings.tokenizer,
        adapter=settings.adapter,
        device=settings.device,
        max_batch=settings.max_batch,
        max_cache_tokens=settings.max_cache_tokens,
        kv_dtype=settings.kv_dtype,
        speculation=Speculation() if settings.speculate else None,
    )
    tokenizer = loaded.engine.tokenizer
    runner = EngineRunner(loaded.engine, max_waiting=settings.max_waiting)
    return Service(
        runner=runner,
        tokenizer=tokenizer,
        name=settings.name or Path(settings.model).name,
        sampling=dataclasses.replace(loaded.sampling, **settings.sampling),
        stop_ids=loaded.stop_ids,
        grammars=Grammars(tokenizer, loaded.stop_ids),
        metrics=Metrics(runner),
        timeout=settings.timeout,
    )
