"""From settings to a service that is ready to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xverse import device
from xverse.config import UserError
from xverse.engine import Speculation
from xverse.engine.adapters import MOST_RANK
from xverse.engine.cache import position_bytes
from xverse.engine.engine import PREFIX_CACHE_BYTES
from xverse.engine.load import load_engine
from xverse.hardware import process_memory
from xverse.kernels.linear import weights_kind
from xverse.serve.batches import Batches
from xverse.serve.caller import URLS
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
    template: str | None = None
    adapter: str | Sequence[str] | None = None
    adapter_folder: str | None = None
    max_lora_rank: int = MOST_RANK
    batch_folder: str | None = None
    quantize: str | None = None
    name: str | None = None
    max_batch: int = 64
    max_waiting: int = 256
    max_cache_tokens: int | None = None
    prefix_cache_mb: int = PREFIX_CACHE_BYTES >> 20
    kv_dtype: str = "auto"
    speculate: bool = False
    batch_invariant: bool | None = None
    timeout: float = 600.0
    threads: int | None = None
    device: str = "auto"
    tensor_parallel: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)


def load_service(settings: ServiceSettings) -> Service:
    """Load the model. Raises UserError if it cannot be loaded or does not fit."""
    folder = None
    if settings.adapter_folder is not None:
        folder = Path(settings.adapter_folder).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"--adapter-folder: {settings.adapter_folder!r} is not a directory")
    batches = None
    if settings.batch_folder is not None:
        batches = Batches(Path(settings.batch_folder).expanduser(), URLS)
    loaded = load_engine(
        settings.model,
        threads=settings.threads,
        quantize=settings.quantize,
        tokenizer=settings.tokenizer,
        template=settings.template,
        adapter=settings.adapter,
        more_adapters=folder is not None,
        most_rank=settings.max_lora_rank,
        device=settings.device,
        tensor_parallel=settings.tensor_parallel,
        max_batch=settings.max_batch,
        max_cache_tokens=settings.max_cache_tokens,
        prefix_cache_bytes=settings.prefix_cache_mb << 20,
        kv_dtype=settings.kv_dtype,
        batch_invariant=settings.batch_invariant,
        speculation=Speculation() if settings.speculate else None,
    )
    tokenizer = loaded.engine.tokenizer
    runner = EngineRunner(loaded.engine, max_waiting=settings.max_waiting)
    name = settings.name or Path(settings.model).name
    service = Service(
        runner=runner,
        tokenizer=tokenizer,
        name=name,
        sampling=dataclasses.replace(loaded.sampling, **settings.sampling),
        stop_ids=loaded.stop_ids,
        grammars=Grammars(tokenizer, loaded.stop_ids),
        metrics=Metrics(runner, name),
        timeout=settings.timeout,
        read_adapter=loaded.read_adapter,
        adapter_folder=folder,
        batches=batches,
    )
    for each, adapter in loaded.adapters.items():
        service.adopt(each, adapter)
    return service


def describe(service: Service, settings: ServiceSettings) -> list[str]:
    """What is served and the memory that it takes, for an operator, one fact per line."""
    engine = service.runner.engine
    weight = engine.model.model.norm.weight
    dtype, config = str(weight.dtype).removeprefix("torch."), engine.model.config
    threads = torch.get_num_threads()
    cpu = "1 CPU thread" if threads == 1 else f"{threads} CPU threads"
    where = cpu if weight.device.type == "cpu" else str(weight.device)
    cache = engine.max_cache_tokens * position_bytes(config, weight.dtype, settings.kv_dtype)
    prefixes = min(settings.prefix_cache_mb << 20, cache)
    stored = dtype if settings.kv_dtype == "auto" else settings.kv_dtype
    size = f"{config.num_parameters() / 1e6:,.0f} million parameters"
    lines = [
        device.describe(engine.device, settings.device),
        f"model: {service.name}, {size}, {weights_kind(engine.model)} weights, {where}",
        f"context: {service.context:,} tokens; {settings.max_batch} requests run at once",
        f"key-value cache: {engine.max_cache_tokens:,} tokens, {_size(cache)}, {stored}; "
        f"at most {_size(prefixes)} of it keep the beginnings of earlier prompts",
    ]
    if service.adapted:
        lines.append(f"adapters: {', '.join(service.adapted)}")
    same = "do not depend" if engine.batch_invariant else "may depend"
    lines.append(f"logits {same} on other requests, prompt chunks and threads (--batch-invariant)")
    resident = process_memory("VmRSS")
    if weight.device.type == "cpu" and resident is not None:
        lines.append(f"memory: {_size(resident)} now, about {_size(resident + cache)} when the cache is full")
    return lines


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
