"""From a model's name to an engine that runs it, with the parameters that its makers chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.config import UserError, build
from xverse.engine.engine import Engine
from xverse.engine.request import Request, Sampling
from xverse.formats import (
    load_model,
    load_tokenizer,
    read_config,
    read_generation_config,
    read_scheme,
    resolve,
)
from xverse.formats.quantize import load_quantizing

if TYPE_CHECKING:
    import torch

    from xverse.model import XverseForCausalLM

# On a CPU small models run in float32: any CPU is fast at it, and their bytes do not matter.
FLOAT32_BELOW = 1_000_000_000
# Their matmuls are so short that a second thread gains little, and loses much on a busy machine.
ONE_THREAD_BELOW = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How replies are generated. The defaults are those that XVERSE published for its chat models.

    Raises UserError, naming the field, for a value out of range.
    """

    temperature: float = 0.5
    top_k: int = 30
    top_p: float = 0.85
    repetition_penalty: float = 1.1
    seed: int | None = None
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        self.request([0])  # its own checks are the ones that count

    def request(self, prompt_ids: list[int], stop_ids: tuple[int, ...] = ()) -> Request:
        return Request(
            prompt_ids=prompt_ids,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed,
            ),
            stop_ids=stop_ids,
        )

    def changed(self, values: Mapping[str, Any], where: str) -> Parameters:
        """A copy with ``values``; raises UserError for an unknown name or a wrong value."""
        return build(Parameters, {**dataclasses.asdict(self), **values}, where)


CHAT = Parameters()
# Of upstream's demonstration of text generation with base models.
COMPLETION = Parameters(temperature=1.0, top_k=50, top_p=0.92, repetition_penalty=1.0, max_new_tokens=100)


def from_generation_config(values: Mapping[str, Any], defaults: Parameters) -> Parameters:
    """What a ``generation_config.json`` says, and ``defaults`` where it is silent."""
    names = {field.name for field in dataclasses.fields(Parameters)}
    chosen = {name: value for name, value in values.items() if name in names and value is not None}
    if values.get("do_sample") is False:
        chosen["temperature"] = 0.0
    return defaults.changed(chosen, "generation_config.json")


@dataclass(frozen=True)
class Loaded:
    """``stop_ids`` end a reply; the directory's generation_config.json stands above the defaults."""

    engine: Engine
    parameters: Parameters
    stop_ids: tuple[int, ...]


def load_engine(
    model: str,
    *,
    defaults: Parameters = CHAT,
    threads: int | None = None,
    quantize: str | None = None,
    tokenizer: str | None = None,
    adapter: str | None = None,
    **settings: Any,
) -> Loaded:
    """An engine for ``model`` (``nano``, a directory or a hub id); ``settings`` are the engine's own.
    ``tokenizer``: a directory with another tokenizer than the model's own.

    ``threads`` None leaves the choice to torch, or one for a small model. ``quantize``: ``int8`` or ``int4``,
    made of an unquantised model as it is loaded. ``adapter``: a directory in peft's format, merged into plain
    weights and kept beside quantised ones. Raises UserError for what cannot be loaded.
    """
    import torch

    path = resolve(model)
    config = read_config(path)
    generation_config = read_generation_config(path)
    parameters = from_generation_config(generation_config, defaults)
    if threads is None and config.num_parameters() < ONE_THREAD_BELOW:
        threads = 1
    if threads is not None:
        if not 1 <= threads <= 1024:
            raise UserError(f"threads: {threads} is out of range (1 to 1024)")
        torch.set_num_threads(threads)
    words = load_tokenizer(path if tokenizer is None else resolve(tokenizer))
    dtype = torch.float32 if config.num_parameters() < FLOAT32_BELOW else None
    if adapter is not None:
        weights = _adapted(path, adapter, quantize, dtype)
    else:
        weights = load_model(path, dtype) if quantize is None else load_quantizing(path, quantize, dtype)
    ends = generation_config.get("eos_token_id", config.eos_token_id)
    stop_ids = tuple(ends) if isinstance(ends, list) else (ends,)
    return Loaded(Engine(weights, words, **settings), parameters, stop_ids)


def _adapted(path: Path, adapter: str, quantize: str | None, dtype: torch.dtype | None) -> XverseForCausalLM:
    """The model with an adapter: merged into plain weights, beside quantised ones in its own precision."""
    from xverse.formats.adapters import apply_adapter, check_adapter, check_base, merge_adapter

    check_adapter(adapter)
    stored = load_model(path)
    if quantize is not None:
        check_base(stored, adapter, path)
        model: XverseForCausalLM = apply_adapter(
            load_quantizing(path, quantize, dtype), adapter
        ).get_base_model()
        return model
    if read_scheme(path) is not None:
        check_base(stored, adapter, path)
        return apply_adapter(load_model(path, dtype), adapter).get_base_model()
    model, _, _ = merge_adapter(stored, adapter, path)
    return model if dtype is None else model.to(dtype)
