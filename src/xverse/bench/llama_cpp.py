"""llama.cpp's quantised types on a model's own weights, through ``llama-cpp-python``: files, sizes, logits.

llama.cpp quantises a file of unrounded weights, with or without an importance matrix, and computes the logits
of the same token ids itself, with a cache in float32. The importance matrix is the mean square of each
linear's inputs, as its tool ``llama-imatrix`` computes it; like that tool's default it leaves out the head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xverse.config import UserError, need
from xverse.formats import ModelDirectory
from xverse.formats.gguf import gguf_name, save_gguf
from xverse.formats.gguf_read import GgufFile
from xverse.model import FullCausal, XverseForCausalLM

UNWEIGHTED = ("Q8_0",)  # types that ignore an importance matrix
_ROWS_AT_ONCE = 8
_FLOAT32 = 0  # ggml's number of the type


def package() -> Any:
    """``llama_cpp``, silenced. Raises UserError with the command that installs it."""
    module = need("llama_cpp", "bench", "bench quality --peers")
    module.llama_log_set(_silence(module), None)
    module.llama_backend_init()
    return module


_silent: list[Any] = []  # the callback has to stay alive


def _silence(module: Any) -> Any:
    if not _silent:
        _silent.append(module.llama_log_callback(lambda level, text, data: None))
    return _silent[0]


def write_source(directory: ModelDirectory, model: XverseForCausalLM, path: Path) -> None:
    """Write the unrounded weights of ``model``, loaded from ``directory``, to a GGUF file."""
    if isinstance(directory, GgufFile):
        _dequantise(directory.path, path)
    else:
        kind = "bf16" if directory.stored_dtype == torch.bfloat16 else "f16"
        save_gguf(model, directory.tokenizer, path, kind, overwrite=True)


def _dequantise(source: Path, target: Path) -> None:
    """A copy of a GGUF file with all weights in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    assert architecture is not None, "xverse has read the architecture from this file"
    writer = gguf.GGUFWriter(target, architecture.contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            gguf.Keys.General.ARCHITECTURE,
            gguf.Keys.General.FILE_TYPE,
        ):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def importance_matrix(model: XverseForCausalLM, rows: Tensor) -> dict[str, Tensor]:
    """The mean squares float32 [K] of every linear's inputs but the head's, by GGUF's name of its weight, on
    ``rows`` int64 [n, T]."""
    sums: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            total = inputs[0].flatten(0, -2).square().sum(dim=0)
            sums[name] = sums[name] + total if name in sums else total

        return hook

    hooks = [
        module.register_forward_pre_hook(record(gguf_name(f"{name}.weight")))
        for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, nn.Linear)
    ]
    for part in rows.split(_ROWS_AT_ONCE):
        model.model(part, FullCausal(*part.shape))
    for hook in hooks:
        hook.remove()
    return {name: total / rows.numel() for name, total in sums.items()}


def quantise(
    module: Any, source: Path, target: Path, kind: str, importance: Mapping[str, Tensor] | None
) -> None:
    """Let llama.cpp write ``source`` as a file of type ``kind``. Raises UserError if it cannot."""
    settings = module.llama_model_quantize_default_params()
    settings.ftype = getattr(module, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = torch.get_num_threads()
    entries = None
    if importance is not None:
        arrays = {name: values.float().contiguous().numpy() for name, values in importance.items()}
        entries = (module.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one stays null
        for entry, (name, values) in zip(entries, arrays.items(), strict=False):
            entry.name, entry.size = name.encode(), len(values)
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = ctypes.cast(entries, ctypes.POINTER(module.llama_model_imatrix_data))
    if module.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        raise UserError(f"llama.cpp could not quantise {source} to {kind}")


def sizes(path: Path) -> dict[str, tuple[int, int]]:
    """The bytes and the number of weights of every tensor in a file."""
    import gguf

    return {
        tensor.name: (int(tensor.n_bytes), int(tensor.n_elements)) for tensor in gguf.GGUFReader(path).tensors
    }


class Scorer:
    """A model file in llama.cpp that computes the logits of rows of tokens."""

    def __init__(self, module: Any, path: Path, length: int) -> None:
        """Rows have ``length`` tokens. Raises UserError if llama.cpp cannot load the file."""
        self._c, self._length = module, length
        self._model = module.llama_model_load_from_file(
            str(path).encode(), module.llama_model_default_params()
        )
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}")
        self._vocab_size = module.llama_vocab_n_tokens(module.llama_model_get_vocab(self._model))
        settings = module.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = _FLOAT32
        settings.flash_attn_type = module.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = module.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UserError(f"llama.cpp has no memory for a context of {length} tokens")
        self._batch = module.llama_batch_init(length, 0, 1)

    def logits(self, row: Sequence[int]) -> Tensor:
        """float32 [T, V] after each token of ``row``."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        batch = self._batch
        batch.n_tokens = len(row)
        for index, token in enumerate(row):
            batch.token[index], batch.pos[index] = token, index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = True
        status = self._c.llama_decode(self._context, batch)
        if status:
            raise UserError(f"llama.cpp cannot score the text (llama_decode failed with {status})")
        flat = np.ctypeslib.as_array(
            self._c.llama_get_logits(self._context), shape=(len(row), self._vocab_size)
        )
        return torch.from_numpy(flat.copy())

    def close(self) -> None:
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)
