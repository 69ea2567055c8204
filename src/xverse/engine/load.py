"""Load a model by name into an engine, with the sampling parameters that its directory sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.config import UserError
from xverse.engine.engine import Engine
from xverse.engine.sampling_params import CHAT, SamplingParams, from_generation_config, unsupported_keys
from xverse.formats import ModelDirectory, load_model
from xverse.formats.quantize import load_quantizing
from xverse.log import notice
from xverse.model.config import FLOAT32_BELOW

if TYPE_CHECKING:
    import torch

    from xverse.model import XverseConfig, XverseForCausalLM
    from xverse.tokenizer import Tokenizer

# The matmuls of smaller models are so short that a second thread gains little, or loses on a busy machine.
ONE_THREAD_BELOW = 100_000_000
_reported: set[Path] = set()


@dataclass(frozen=True)
class Loaded:
    """An engine, the sampling parameters of its model, and the token ids that end a reply."""

    engine: Engine
    sampling: SamplingParams
    stop_ids: tuple[int, ...]


def load_engine(
    model: str | ModelDirectory,
    *,
    defaults: SamplingParams = CHAT,
    threads: int | None = None,
    quantize: str | None = None,
    tokenizer: str | None = None,
    adapter: str | None = None,
    **settings: Any,
) -> Loaded:
    """An engine for ``model`` (``nano``, a directory or a hub id); ``settings`` are the engine's.

    ``defaults`` apply to parameters that the directory's generation_config.json does not set. ``tokenizer``:
    a directory with a tokenizer to use instead of the model's. ``threads`` None: torch's default, or one for
    a small model. ``quantize``: ``int8`` or ``int4``, applied to an unquantised model while it is loaded.
    ``adapter``: a directory in peft's format, merged into plain weights, kept separate from quantised ones.
    Raises UserError for a model, tokenizer or adapter that cannot be loaded.
    """
    import torch

    directory = ModelDirectory.named(model)
    config, generation_config = directory.config, directory.generation_config
    sampling = from_generation_config(generation_config, defaults)
    _report_unsupported(directory.path, generation_config)
    if threads is None and config.num_parameters() < ONE_THREAD_BELOW:
        threads = 1
    if threads is not None:
        if not 1 <= threads <= 1024:
            raise UserError(f"threads: {threads} is out of range (1 to 1024)")
        torch.set_num_threads(threads)
    own_tokenizer = (directory if tokenizer is None else ModelDirectory.named(tokenizer)).tokenizer
    dtype = torch.float32 if config.num_parameters() < FLOAT32_BELOW else None
    if adapter is not None:
        weights = _adapted(directory, adapter, quantize, dtype)
    else:
        weights = (
            load_model(directory, dtype) if quantize is None else load_quantizing(directory, quantize, dtype)
        )
    stop_ids = _stop_ids(generation_config, config, own_tokenizer)
    return Loaded(Engine(weights, own_tokenizer, **settings), sampling, stop_ids)


def _stop_ids(
    generation_config: dict[str, Any], config: XverseConfig, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """The ids that end a reply. Chat models of other publishers end a turn with a token that only their
    tokenizer names."""
    ids = generation_config.get("eos_token_id", config.eos_token_id)
    ids = [*ids] if isinstance(ids, list) else [ids]
    if tokenizer.template is not None:
        ids.append(tokenizer.eos_id)
    return tuple(dict.fromkeys(index for index in ids if index is not None and index >= 0))


def _report_unsupported(path: Path, generation_config: dict[str, Any]) -> None:
    """Report keys of a generation_config.json that have no effect, once per directory."""
    keys = unsupported_keys(generation_config)
    if keys and path not in _reported:
        _reported.add(path)
        notice(f"{path / 'generation_config.json'}: {', '.join(keys)} not supported; ignored")


def _adapted(
    directory: ModelDirectory, adapter: str, quantize: str | None, dtype: torch.dtype | None
) -> XverseForCausalLM:
    """The model with an adapter: merged into plain weights, or kept separate from quantised ones."""
    from xverse.formats.adapters import apply_adapter, check_adapter, check_base, merge_adapter

    check_adapter(adapter)
    stored = load_model(directory)
    if quantize is not None:
        check_base(stored, adapter, directory.path)
        model: XverseForCausalLM = apply_adapter(
            load_quantizing(directory, quantize, dtype), adapter
        ).get_base_model()
        return model
    if directory.scheme is not None:
        check_base(stored, adapter, directory.path)
        return apply_adapter(load_model(directory, dtype), adapter).get_base_model()
    model, _, _ = merge_adapter(stored, adapter, directory.path)
    return model if dtype is None else model.to(dtype)
