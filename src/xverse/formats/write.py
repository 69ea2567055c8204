"""Write a model directory: ``hf`` (XVERSE for transformers) or ``llama`` (stock ``LlamaForCausalLM``).

Writing is atomic. An existing target is replaced only on request and only if it is a model directory, because
replacing it deletes every file in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.files import atomic_directory, check_writable
from xverse.formats.directory import check_vocabulary
from xverse.formats.schemes import write_quantized
from xverse.formats.shim import AUTO_MAP, SHIM_FILES
from xverse.formats.weights import DTYPES, HEAD, SafetensorsWriter, dtype_name
from xverse.kernels.weight import QuantizedWeight
from xverse.model import XverseConfig, XverseForCausalLM

if TYPE_CHECKING:
    from xverse.tokenizer import Tokenizer

SHARD_BYTES = 2 * 10**9  # at 7B this gives 8 shards, as published
DOCUMENTS = ("LICENSE*", "NOTICE*", "README*")  # copied along with the weights


def save_hf(
    model: XverseForCausalLM,
    tokenizer: Tokenizer,
    path: str | Path,
    dtype: torch.dtype | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    documents: str | Path | None = None,
    *,
    llama: bool = False,
) -> None:
    """Write XVERSE's published layout (config keys, tensor names) with the shim for ``trust_remote_code``.

    ``dtype`` None keeps the model's. ``documents`` is a directory whose licence and model card are copied.
    Raises UserError if the target cannot or must not be written; nothing is left half-written.
    """
    dtype, config = dtype or model.lm_head.weight.dtype, model.config
    if dtype_name(dtype) not in DTYPES:
        raise UserError(f"{dtype_name(dtype)} weights cannot be written; known: {', '.join(DTYPES)}")
    values, shim = _description(config, dtype, llama)
    with _directory(
        Path(path), config, tokenizer, generation_config, overwrite, documents, shim
    ) as directory:
        _write_json(directory / "config.json", values)
        _write_weights(model, directory, dtype, max_shard_bytes)


def save_llama(
    model: XverseForCausalLM,
    tokenizer: Tokenizer,
    path: str | Path,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """As ``save_hf``, but for ``LlamaForCausalLM``, so that every program that loads Llama can load it.

    In float32 the logits are equal. In 16 bits they differ by rounding, because Llama's norm casts before it
    multiplies by the weight and XVERSE's after.
    """
    save_hf(model, tokenizer, path, dtype, llama=True, **options)


def _description(
    config: XverseConfig, dtype: torch.dtype, llama: bool
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """``config.json``, and the shim's files by name, which other families do not need."""
    if llama:
        config.without_experts("export as Llama")
    if config.model_type != "xverse":
        if llama:
            if config.qk_norm or config.attention_bias != config.output_bias:
                raise UserError(f"a {config.model_type} model cannot be written as Llama; export it as hf")
            config = dataclasses.replace(config, model_type="llama")
        return config.to_json(dtype_name(dtype)), {}
    if llama:
        return llama_config(config, dtype), {}
    return {**config.to_json(dtype_name(dtype)), "auto_map": AUTO_MAP}, SHIM_FILES


def llama_config(config: XverseConfig, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the same model as Llama, which has no ``max_tokenizer_truncation``."""
    values = config.to_json(dtype_name(dtype))
    values.pop("max_tokenizer_truncation")
    return {
        **values,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_key_value_heads,
        "rope_scaling": values.get("rope_scaling"),
    }


def describe_model(
    directory: Path,
    config: XverseConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write everything of a model directory in XVERSE's layout except the weights and the shim."""
    _write_json(directory / "config.json", config.to_json(dtype_name(dtype)))
    _write_json(directory / "generation_config.json", generation_config or _token_ids(config))
    tokenizer.save(directory)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise UserError if writing a directory at ``path`` would delete something without ``overwrite``."""
    if path.is_dir() and any(path.iterdir()):
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: exists and is not a model directory; choose another path")
        if not overwrite:
            raise UserError(f"{path}: already holds a model; --overwrite replaces it")
    elif path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; choose another path")
    check_writable(path.parent)


def save_quantized(
    tensors: Iterable[tuple[str, Tensor | QuantizedWeight]],
    config: XverseConfig,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    llama: bool = False,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    documents: str | Path | None = None,
    activations: bool = False,
) -> None:
    """Write a quantised model in compressed-tensors' ``pack-quantized`` format, tensor by tensor, or with
    ``activations`` in ``int-quantized``, for products with INT8 activations.

    ``llama``: for ``LlamaForCausalLM``, otherwise XVERSE's layout. Tensors that are not quantised keep their
    dtype. Raises UserError as ``save_hf`` does.
    """
    path = Path(path)
    values, shim = _description(config, torch.bfloat16, llama)
    with _directory(path, config, tokenizer, generation_config, overwrite, documents, shim) as directory:
        values |= write_quantized(tensors, config, directory, max_shard_bytes, activations)
        _write_json(directory / "config.json", values)


@contextlib.contextmanager
def _directory(
    path: Path,
    config: XverseConfig,
    tokenizer: Tokenizer,
    generation_config: Mapping[str, Any] | None,
    overwrite: bool,
    documents: str | Path | None,
    shim: Mapping[str, str],
) -> Iterator[Path]:
    """A temporary directory with all but config.json and the weights; it replaces ``path`` at the end."""
    check_target(path, overwrite)
    check_vocabulary(tokenizer, config, path)
    with atomic_directory(path) as directory:
        _write_json(directory / "generation_config.json", generation_config or _token_ids(config))
        try:
            tokenizer.save(directory)
        except UserError as error:  # its message names the temporary directory
            raise error.__cause__ if isinstance(error.__cause__, OSError) else error from None
        for name, text in shim.items():
            (directory / name).write_text(text, encoding="utf-8")
        for pattern in DOCUMENTS if documents else ():
            for file in Path(documents or "").glob(pattern):
                shutil.copyfile(file, directory / file.name)
        yield directory


def _token_ids(config: XverseConfig) -> dict[str, int | None]:
    return {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def _write_weights(
    model: XverseForCausalLM, directory: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors[HEAD]
    writer = SafetensorsWriter(directory, len(tensors), max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor.detach().to(dtype))
    writer.close()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
