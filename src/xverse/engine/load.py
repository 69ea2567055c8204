"""Load a model by name into an engine, with the sampling parameters that its directory sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.config import UserError
from xverse.device import compute_device, guard, report_unused_gpu, weights_dtype
from xverse.engine.adapters import MOST_RANK, Adapter, AdapterLoader, given_adapters
from xverse.engine.dividing import Division, check_division
from xverse.engine.engine import Engine
from xverse.engine.follower import lead
from xverse.engine.ranks import Ranks
from xverse.engine.sampling_params import CHAT, SamplingParams, from_generation_config, unsupported_keys
from xverse.formats import ModelDirectory, load_model
from xverse.formats.adapters import check_adapter, merged
from xverse.formats.quantize import load_quantizing, quick_settings, stored_bytes
from xverse.formats.schemes import Placed
from xverse.hardware import available_memory
from xverse.log import notice
from xverse.model.config import FLOAT32_BELOW
from xverse.tokenizer.published import with_format

if TYPE_CHECKING:
    import torch

    from xverse.model import XverseForCausalLM
    from xverse.tokenizer import Tokenizer

MERGED_RANK = 1024  # of a single adapter, which is a part of the model
# The matmuls of smaller models are so short that a second thread gains little, or loses on a busy machine.
ONE_THREAD_BELOW = 100_000_000
_reported: set[Path] = set()


@dataclass(frozen=True)
class Loaded:
    """An engine, the sampling parameters of its model, and the token ids that end a reply; ``ranks`` are the
    processes over which the model is divided."""

    engine: Engine
    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    read_adapter: AdapterLoader  # of the engine's model
    adapters: dict[str, Adapter] = field(default_factory=dict)  # those with names
    ranks: Ranks | None = None


def load_engine(
    model: str | ModelDirectory,
    *,
    defaults: SamplingParams = CHAT,
    threads: int | None = None,
    quantize: str | None = None,
    tokenizer: str | None = None,
    adapter: str | Sequence[str] | None = None,
    more_adapters: bool = False,
    most_rank: int = MOST_RANK,
    template: str | None = None,
    device: str = "auto",
    tensor_parallel: int = 1,
    ranks: Ranks | None = None,
    **settings: Any,
) -> Loaded:
    """An engine for ``model`` (``nano``, a directory or a hub id); ``settings`` are the engine's.

    ``defaults`` apply to parameters that the directory's generation_config.json does not set. ``tokenizer``:
    a directory with a tokenizer to use instead of the model's. ``template``: the name of a chat format
    (``tokenizer/published.py``) for a model whose files have none. ``threads`` None: torch's default, or
    one for a small model. ``quantize``: ``int8`` or ``int4``, applied to an unquantised model while it is
    loaded. ``adapter``: a directory in peft's format, merged into plain weights, kept separate from quantised
    ones; or several as ``NAME=DIR``, which requests choose. ``more_adapters``: others may be read later, so
    the inputs of quantised layers must stay as they were; ``most_rank`` is the highest rank of those with
    names. ``device``: as ``compute_device`` takes it. ``tensor_parallel``: over how many GPUs, or processes
    on the CPU, the model is divided; the others are started here and end with this one or by
    ``Ranks.close``. ``ranks`` is set in these. Raises UserError for a model, tokenizer or adapter that cannot
    be loaded, a device that cannot be used and one without room for the weights.
    """
    import torch

    directory = ModelDirectory.named(model)
    config, generation_config = directory.config, directory.generation_config
    sampling = from_generation_config(generation_config, defaults)
    _report_unsupported(directory.path, generation_config)
    if threads is None and config.num_parameters() < ONE_THREAD_BELOW:
        threads = 1
    elif threads is None and tensor_parallel > 1:
        threads = max(1, torch.get_num_threads() // tensor_parallel)
    if threads is not None:
        if not 1 <= threads <= 1024:
            raise UserError(f"threads: {threads} is out of range (1 to 1024)")
        torch.set_num_threads(threads)
    own_tokenizer = (directory if tokenizer is None else ModelDirectory.named(tokenizer)).tokenizer
    if template is not None:
        own_tokenizer = with_format(own_tokenizer, template, directory.name)
    quantised = quantize is not None or directory.scheme is not None
    alone, named = given_adapters(adapter)
    for path in (*named.values(), *([] if alone is None else [alone])):
        check_adapter(path)
    if tensor_parallel > 1:
        check_division(config, tensor_parallel)
        if named or more_adapters:
            raise UserError("--tensor-parallel cannot divide adapters with names; use one process")
        if alone is not None and quantised:
            raise UserError(
                "--tensor-parallel cannot divide an adapter of quantised weights; merge it with xverse export"
            )
        given = {
            "quantize": quantize,
            "tokenizer": tokenizer,
            "template": template,
            "adapter": alone,
            "threads": threads,
        }
        given |= {"model": str(directory.path), "device": device}
        given |= {name: value for name, value in settings.items() if name != "speculation"}
        ranks = Ranks.start(tensor_parallel, given)
    chosen = compute_device(device) if ranks is None else ranks.device
    if device == "auto" and (ranks is None or ranks.rank == 0):
        report_unused_gpu(chosen)
    dtype = weights_dtype(chosen) or (torch.float32 if config.num_parameters() < FLOAT32_BELOW else None)
    check_room(directory, chosen, dtype, quantize, 1 if ranks is None else ranks.count)
    division = None if ranks is None else Division(ranks)
    # Whole weights that are only read from a file are divided on the CPU.
    place = chosen if ranks is None or quantize is not None else torch.device("cpu")
    with guard(chosen):
        if alone is not None and not quantised:
            weights = merged(load_model(directory, device=place), alone, directory.path)
            weights = weights if dtype is None else weights.to(dtype)
        else:
            balance = alone is None and not named and not more_adapters
            placed = None if division is None else division.placed
            weights = load_weights(directory, quantize, dtype, place, balance, placed)
        if division is not None:
            weights = division.finish(weights)
    read_adapter = AdapterLoader(directory, weights, most_rank)
    if alone is not None and quantised:
        settings["adapter"] = read_adapter(alone, MERGED_RANK)
    adapters = {name: read_adapter(path) for name, path in named.items()}
    stop_ids = ending_ids(generation_config, config.eos_token_id, own_tokenizer)
    engine = Engine(weights, own_tokenizer, **settings)
    if ranks is not None and ranks.rank == 0:
        lead(engine, ranks)
    return Loaded(engine, sampling, stop_ids, read_adapter, adapters, ranks)


def ending_ids(
    generation_config: dict[str, Any], eos: int | list[int] | None, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """The ids that end a reply. Chat models of other publishers end a turn with a token that only their
    tokenizer names."""
    ids = generation_config.get("eos_token_id", eos)
    ids = [*ids] if isinstance(ids, list) else [ids]
    if tokenizer.template is not None:
        ids += [tokenizer.eos_id, *tokenizer.stop_ids]
    return tuple(dict.fromkeys(index for index in ids if index is not None and index >= 0))


def _report_unsupported(path: Path, generation_config: dict[str, Any]) -> None:
    """Report keys of a generation_config.json that have no effect, once per directory."""
    keys = unsupported_keys(generation_config)
    if keys and path not in _reported:
        _reported.add(path)
        notice(f"{path / 'generation_config.json'}: {', '.join(keys)} not supported; ignored")


def load_weights(
    directory: ModelDirectory,
    quantize: str | None,
    dtype: torch.dtype | None,
    device: torch.device,
    balance: bool = True,
    placed: Placed | None = None,
) -> XverseForCausalLM:
    """The model on ``device``, tensor by tensor; with ``quantize`` quantised there layer by layer, as
    ``load_quantizing`` takes ``balance``. ``placed`` is called for each quantised matrix."""
    if quantize is not None:
        return load_quantizing(directory, quantize, dtype, device, balance, placed=placed)
    return load_model(directory, dtype, device, placed=placed)


def check_room(
    directory: ModelDirectory,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: str | None,
    count: int = 1,
) -> None:
    """Raises UserError, with what would fit, if the weights exceed the memory of ``count`` GPUs."""
    if device.type != "cuda":
        return
    config, free = directory.config, available_memory(device)
    if directory.scheme is not None:
        needed, what = sum(file.stat().st_size for file in directory.weight_files), "as stored"
    elif quantize is not None:
        needed, what = stored_bytes(config, quick_settings(quantize, config)), f"in {quantize}"
    else:
        itemsize = dtype.itemsize if dtype is not None else 4
        needed, what = config.num_parameters() * itemsize, f"in {str(dtype).removeprefix('torch.')}"
    if needed < count * free:
        return
    sizes = (
        {}
        if directory.scheme
        else {k: stored_bytes(config, quick_settings(k, config)) for k in ("int8", "int4")}
    )
    fitting = [
        f"--quantize {kind} ({size / 1e9:.1f} GB)" for kind, size in sizes.items() if size < count * free
    ]
    heads = range(count + 1, config.num_key_value_heads + 1)
    enough = next((n for n in heads if config.num_key_value_heads % n == 0 and needed < n * free), None)
    if enough is not None:
        fitting.append(f"--tensor-parallel {enough} on as many such GPUs")
    use = ", ".join([*fitting, "or --device cpu" if fitting else "--device cpu"])
    raise UserError(
        f"{directory.name}: the weights take {needed / 1e9:.1f} GB {what}, and {device} has "
        f"{free / 1e9:.1f} GB free; use {use}"
    )
