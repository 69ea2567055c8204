"""Quantise the model of a directory layer by layer, in memory or to another directory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xverse.config import UserError, choose
from xverse.formats.directory import ModelDirectory
from xverse.formats.mapped import keep_in_file
from xverse.formats.read import check_tied, load_model
from xverse.formats.schemes import Placed, set_layer
from xverse.formats.weights import IGNORED_SUFFIX, check_tensors, misfit
from xverse.formats.write import check_target, save_quantized
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.weight import BITS, QuantizedWeight
from xverse.log import console, notice, progress
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM
from xverse.quant import mixing
from xverse.quant.head import row_centres
from xverse.quant.parity import ParityReport
from xverse.quant.quantizer import EMBEDDING, HEAD, Quantizer
from xverse.quant.settings import Format, QuantSettings, fitting_group, input_sizes, matrices
from xverse.quant.text import loading_calibration, resized

if TYPE_CHECKING:
    from xverse.tokenizer import Tokenizer

Progress = Callable[[str], None]
# Of calibration text for the forward and backward pass that measures sensitivity.
_SENSITIVITY_TOKENS, _SENSITIVITY_TOKENS_LARGE, _SENSITIVITY_LENGTH = 4096, 512, 128


class Source:
    """The tensors of an unquantised model directory, on ``device``; names are checked at once, shapes as
    tensors are read.

    Raises UserError if the directory is quantised or does not hold the model's tensors.
    """

    def __init__(self, directory: ModelDirectory, device: torch.device | str = "cpu") -> None:
        self._device = device
        path = self.path = directory.path
        self.config = directory.config
        if directory.scheme is not None:
            raise UserError(f"{path}: is already quantised; quantise the model it was made from")
        state = XverseForCausalLM.empty(self.config).state_dict()
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        check_tied(directory)
        self._files = directory.tensors
        ignored = [IGNORED_SUFFIX]
        if self.config.tie_word_embeddings:
            del self._shapes[HEAD]
            ignored.append(HEAD)
        names = [name for name in self._files.names if not name.endswith(tuple(ignored))]
        missing = [name for name in self._shapes if name not in self._files]
        check_tensors(path, missing, [name for name in names if name not in self._shapes])

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, for ``Quantizer``."""
        tensors = {}
        for name in self._shapes:
            if name.startswith(prefix):
                tensor = self._files.get(name).to(self._device)
                if what := misfit(tensor, self._shapes[name]):
                    check_tensors(self.path, wrong={name: what})
                # The sum of any NaN or infinity is not finite.
                if not tensor.sum(dtype=torch.float32).isfinite():
                    raise UserError(f"{self.path}: {name} holds NaN or infinity; it cannot be quantised")
                tensors[name] = tensor
        return tensors


def quantize_directory(
    source: str | Path | ModelDirectory,
    out: Path,
    tokenizer: Tokenizer,
    settings: QuantSettings,
    *,
    llama: bool = False,
    calibration: Tensor | None = None,
    sample: Tensor | None = None,
    overwrite: bool = False,
    report_progress: Progress | None = None,
    device: torch.device | str = "cpu",
    activations: bool = False,
) -> ParityReport:
    """Quantise ``source`` on ``device`` into the directory ``out`` (compressed-tensors) with one layer at a
    time in memory.

    ``llama``: for stock ``LlamaForCausalLM``; ``activations``: for products with INT8 activations. Raises
    UserError if the source cannot be read or is quantised, the settings do not fit it, the target must not be
    written, or the disk has no room for the result.
    """
    check_target(out, overwrite)
    directory = ModelDirectory.of(source)
    if out.exists() and out.samefile(directory.path):
        raise UserError(f"{out}: is the source model; choose another path for the quantised one")
    tensors = Source(directory, device)
    _check_space(out, stored_bytes(tensors.config, settings))
    run = Quantizer(
        tensors.config,
        tensors.read,
        settings,
        calibration=calibration,
        sample=sample,
        progress=report_progress,
    )
    save_quantized(
        ((name, tensor.cpu()) for name, tensor in run.tensors()),
        dataclasses.replace(tensors.config, tie_word_embeddings=False),
        tokenizer,
        out,
        llama=llama,
        generation_config=directory.generation_config,
        overwrite=overwrite,
        documents=directory.path,
        activations=activations,
    )
    return run.report


def quick_settings(kind: str, config: XverseConfig) -> QuantSettings:
    """The settings of ``int8``, ``int4``, ``int3`` or ``int2``, with groups of 128 (3 and 2 bits: 64) or the
    largest part of it that divides the inputs of every layer. Raises UserError for any other ``kind``."""
    bits = choose("quantize", kind, {f"int{bits}": bits for bits in reversed(BITS)})
    largest = QuantSettings.group_size if bits >= 4 else 64
    group = min(fitting_group(inputs, largest) for inputs in input_sizes(config))
    return QuantSettings(bits=bits, group_size=group, embedding_bits=16)


def load_quantizing(
    directory: str | Path | ModelDirectory,
    kind: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    balance: bool = True,
    placed: Placed | None = None,
) -> XverseForCausalLM:
    """Load an unquantised directory with weights quantised on ``device`` to ``int8`` or ``int4`` as they are
    read. Without ``balance`` the inputs of each linear stay the same, as an adapter needs them.

    At most one layer is in memory unquantised; on the CPU the embedding stays in the mapped file. ``dtype``
    is that of the other tensors, None the stored one; ``placed`` is called for each matrix. Raises UserError
    as ``quantize_directory`` does.
    """
    directory = ModelDirectory.of(directory)
    # The kernels of GPUs have no tables.
    on_cpu = torch.device(device).type == "cpu"
    settings = dataclasses.replace(quick_settings(kind, directory.config), balance=balance, table=on_cpu)
    if settings.group_size != QuantSettings.group_size:
        notice(
            f"quantize: groups of {settings.group_size}, because {QuantSettings.group_size} does not divide "
            "every layer"
        )
    with progress_bar(directory.config) as progress:
        calibration = _loading_calibration(directory)
        tensors = quantized_tensors(directory, settings, calibration, device, progress)
        return build(directory.config, tensors, dtype, placed)


def _loading_calibration(directory: ModelDirectory) -> Tensor | None:
    """Tokens of the package's text; None, for random ones, if the directory has no tokenizer that fits."""
    try:
        tokens = loading_calibration(directory.tokenizer)
    except UserError:  # weights alone can be quantised; who needs the tokenizer reports what is wrong with it
        return None
    return tokens if int(tokens.max()) < directory.config.vocab_size else None


def quantized_tensors(
    directory: ModelDirectory,
    settings: QuantSettings,
    calibration: Tensor | None,
    device: torch.device | str = "cpu",
    report_progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """The tensors of an unquantised directory, quantised one layer at a time. Raises UserError as ``Source``
    and ``Quantizer`` do."""
    source = Source(directory, device)
    return Quantizer(
        source.config, source.read, settings, calibration=calibration, progress=report_progress
    ).tensors()


def mixed_formats(
    directory: ModelDirectory,
    bits: float,
    calibration: Tensor,
    settings: QuantSettings,
    device: torch.device | str = "cpu",
) -> dict[str, Format]:
    """The format of every matrix, rounded by ``settings``, for ``bits`` per weight on average, norms included
    and the embedding not, by the sensitivity measured on a part of ``calibration`` int64 [n, T]. Raises
    UserError if no choice fits."""
    directory.config.without_experts("--bpw")
    source = Source(directory, device)
    config = source.config
    shapes = [*matrices(config), (mixing.HEAD, config.vocab_size, config.hidden_size)]
    weights = sum(outputs * inputs for _, outputs, inputs in shapes)
    small = config.num_parameters() < 10**9
    run = Quantizer(config, source.read, settings, calibration=calibration)
    model = run.whole_source() if small else load_model(directory, None, device)
    norms = [value for value in model.parameters() if value.dim() == 1]
    plain = sum(value.numel() * directory.stored_dtype.itemsize for value in norms)
    counted = weights + sum(value.numel() for value in norms)
    notice("quantize: measuring the sensitivity of every layer")
    tokens = _SENSITIVITY_TOKENS if small else _SENSITIVITY_TOKENS_LARGE
    rows = resized(calibration, tokens, _SENSITIVITY_LENGTH).to(device)
    matrices_by_name = {name: model.get_parameter(f"{name}.weight").detach() for name, _, _ in shapes}
    if settings.method == "gptq" and settings.table:  # then the head's rows are rounded without their centres
        head = matrices_by_name[mixing.HEAD].float()
        with torch.no_grad():
            hidden = model.model(rows, FullCausal(*rows.shape)).flatten(0, 1).float()
            centres, nearest = row_centres(head, hidden)
        matrices_by_name[mixing.HEAD] = head - centres[nearest]
        plain += 2 * centres.numel() + len(nearest)
    found = mixing.measure(model, rows, feedback=small and settings.method == "gptq")
    units = mixing.measure_units(config, found, matrices_by_name, settings)
    return mixing.choose_formats(units, bits, counted, plain)


@contextlib.contextmanager
def progress_bar(config: XverseConfig) -> Iterator[Progress]:
    """A bar on stderr that advances by one step per call, if stderr is a terminal."""
    with progress(disable=not console.is_terminal) as bar:
        task = bar.add_task("quantising", total=config.num_hidden_layers + 2)
        steps = itertools.count()
        yield lambda step: bar.update(task, completed=next(steps), description=step)


def build(
    config: XverseConfig,
    tensors: Iterator[tuple[str, Tensor | QuantizedWeight]],
    dtype: torch.dtype | None = None,
    placed: Placed | None = None,
) -> XverseForCausalLM:
    """A model built from tensors one by one; quantised weights become quantised layers. ``placed`` is called
    for each matrix."""
    config = dataclasses.replace(config, tie_word_embeddings=False)
    model = XverseForCausalLM.empty(config)
    for name, tensor in tensors:
        place(model, name, tensor, dtype)
        if placed is not None and isinstance(tensor, QuantizedWeight):
            placed(model, name.removesuffix(".weight"))
    if isinstance(model.model.embed_tokens, nn.Embedding):
        keep_in_file(model.model.embed_tokens)
    return model


def place(
    model: nn.Module, name: str, tensor: Tensor | QuantizedWeight, dtype: torch.dtype | None = None
) -> None:
    """Put the tensor ``name`` into ``model``, without moving it; ``dtype`` casts a plain one."""
    module, kind = name.rsplit(".", 1)
    if isinstance(tensor, Tensor):
        value = tensor if dtype is None else tensor.to(dtype)
        if value.dim() == 1:
            value = value.clone()  # otherwise each norm would keep its neighbourhood in the file resident
        setattr(model.get_submodule(module), kind, nn.Parameter(value, requires_grad=False))
    elif name == EMBEDDING:
        set_layer(model, module, QuantEmbedding.from_weight(tensor, dtype or torch.bfloat16))
    else:
        set_layer(
            model, module, QuantLinear.from_weight(tensor, getattr(model.get_submodule(module), "bias", None))
        )


def stored_bytes(config: XverseConfig, settings: QuantSettings) -> int:
    """The approximate size of a quantised model in bytes, on disk and in memory."""

    def size(name: str, outputs: int, inputs: int, bits: int | None = None) -> float:
        if bits == 16:
            return 2 * outputs * inputs
        if settings.method == "rtn-row":
            return outputs * (inputs * settings.bits / 8 + 2)
        width, group = settings.format_of(name, inputs, bits)
        return outputs * inputs * (width / 8 + 2 / group)

    linears = sum(size(*matrix) for matrix in matrices(config))
    vocabulary = (config.vocab_size, config.hidden_size)
    head = size("lm_head", *vocabulary, settings.resolved_head_bits)
    return int(linears + head + size("model.embed_tokens", *vocabulary, settings.resolved_embedding_bits))


def _check_space(out: Path, needed: int) -> None:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{out}: the result needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; "
            "nothing was written"
        )
