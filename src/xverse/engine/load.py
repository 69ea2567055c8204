"""From a model's name to an engine that runs it, with the parameters that its makers chose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.config import UserError
from xverse.engine.engine import Engine
from xverse.engine.sampling_params import CHAT, SamplingParams, from_generation_config, unsupported_keys
from xverse.formats import (
    load_model,
    load_tokenizer,
    read_config,
    read_generation_config,
    read_scheme,
    resolve,
)
from xverse.formats.quantize import load_quantizing
from xverse.log import notice
from xverse.model.config import FLOAT32_BELOW

if TYPE_CHECKING:
    import torch

    from xverse.model import XverseForCausalLM

# Their matmuls are so short that a second thread gains little, and loses much on a busy machine.
ONE_THREAD_BELOW = 100_000_000
_reported: set[Path] = set()


@dataclass(frozen=True)
class Loaded:
    """``stop_ids`` end a reply; the directory's generation_config.json stands above the defaults."""

    engine: Engine
    sampling: SamplingParams
    stop_ids: tuple[int, ...]


def load_engine(
    model: str,
    *,
    defaults: SamplingParams = CHAT,
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
    sampling = from_generation_config(generation_config, defaults)
    _report_unsupported(path, generation_config)
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
    return Loaded(Engine(weights, words, **settings), sampling, stop_ids)


def _report_unsupported(path: Path, generation_config: dict[str, Any]) -> None:
    """Once per directory and process."""
    keys = unsupported_keys(generation_config)
    if keys and path not in _reported:
        _reported.add(path)
        notice(f"{path / 'generation_config.json'}: not supported, without effect: {', '.join(keys)}")


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
