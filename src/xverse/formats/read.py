"""Read a model directory: upstream XVERSE as published, Hugging Face safetensors, Llama-named exports, and
quantised ones (compressed-tensors, GPTQ)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xverse.config import UserError, nearest
from xverse.formats.mapped import keep_in_file
from xverse.formats.quantized import (
    Scheme,
    dequantized,
    layer_of,
    load_layers,
    quantization_of,
    quantized_names,
)
from xverse.formats.weights import (
    DTYPES,
    TensorFiles,
    dtype_name,
    listed,
    read_json,
    read_tensors,
    weight_files,
)
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.model.config import FLOAT32_BELOW

if TYPE_CHECKING:
    from xverse.tokenizer import Tokenizer

# What a Llama config means where it leaves a key out (transformers' LlamaConfig); ours differs.
LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
# Precomputed rotary frequencies in upstream's files: the model computes its own.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


def check_directory(path: str | Path) -> Path:
    """``path`` as a Path. Raises UserError where it is no model directory, naming what it has instead."""
    path = Path(path)
    if not path.exists():
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such directory{nearest(path.name, siblings)}")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; give the model directory that holds config.json")
    if not (path / "config.json").exists():
        found = sorted(item.name for item in path.iterdir())
        holds = f"it holds {listed(found)}" if found else "it is empty"
        raise UserError(f"{path}: not a model directory: no config.json ({holds})")
    return path


def read_config(path: str | Path) -> XverseConfig:
    """``config.json`` of a directory, upstream's or a Llama-named one that fits XVERSE's structure.

    Raises UserError that names what does not fit: another model type, biases, grouped-query attention,
    rope scaling, tied embeddings, weights that are quantised in a way that is not supported.
    """
    file = check_directory(path) / "config.json"
    values = read_json(file)
    model_type = values.get("model_type")
    if model_type not in ("xverse", "llama"):
        raise UserError(f"{file}: model_type {model_type!r} is neither 'xverse' nor 'llama'")
    if values.get("num_experts"):
        raise UserError(f"{file}: a mixture of experts (num_experts) is not supported")
    quantization_of(file.parent, values)
    if model_type == "llama":
        values = {**LLAMA_DEFAULTS, **values}
    config = XverseConfig.from_json(values, str(file))
    head_dim = values.get("head_dim") or config.head_dim
    if head_dim != config.head_dim:
        raise UserError(f"{file}: head_dim {head_dim} is not hidden_size / num_attention_heads")
    return config


def read_scheme(path: str | Path) -> Scheme | None:
    """How the weights of a directory are quantised; None where they are not. Raises UserError as
    ``read_config`` does."""
    path = check_directory(path)
    return quantization_of(path, read_json(path / "config.json"))


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """``generation_config.json`` of a directory; empty where there is none."""
    file = Path(path) / "generation_config.json"
    return read_json(file) if file.exists() else {}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, repaired in memory where upstream's needs it.

    Raises UserError where there is none, or where its ids do not fit the model's vocabulary.
    """
    from xverse.tokenizer import Tokenizer

    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path}: has no tokenizer.json; copy it from the model's published directory")
    tokenizer = Tokenizer.load(path)
    if (path / "config.json").exists():
        check_vocabulary(tokenizer, read_config(path), path)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: XverseConfig, where: str | Path) -> None:
    """Raises UserError where the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; "
            "they do not belong together"
        )


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    dequantize: bool = False,
) -> XverseForCausalLM:
    """Load a model directory. ``dtype`` None keeps the stored one.

    On the CPU in the stored dtype the parameters are the memory-mapped files themselves (private pages:
    writing to them copies, never reaches the file). Otherwise tensors are converted one by one. Quantised
    matrices become ``QuantLinear`` and ``QuantEmbedding``, or with ``dequantize`` plain weights of ``dtype``
    (None: float32, which holds them exactly; above a billion parameters the stored type of the others).
    Raises UserError, in one line, for missing, unexpected and mis-shaped tensors together, and for a damaged
    quantised one by its name.
    """
    path = Path(path)
    config = read_config(path)
    scheme = read_scheme(path)
    device = torch.device(device)
    with torch.device("meta"):
        model = XverseForCausalLM(config)
    files = weight_files(path)
    if scheme is not None:
        _load_quantized(model, path, TensorFiles(files), scheme, dtype, device, dequantize)
        return model
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    stored = _stored_dtype(files[0])
    dtype = dtype or stored
    state: dict[str, Tensor] = {}
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    for file in files:
        for name, tensor in read_tensors(file, hold=dtype == stored and device.type == "cpu"):
            _take(name, tensor, expected, dtype, device, state, unexpected, wrong)
    missing = [name for name in expected if name not in state and name not in wrong]
    check_tensors(path, missing, unexpected, wrong)
    model.load_state_dict(state, assign=True)
    return model


def _take(
    name: str,
    tensor: Tensor,
    expected: dict[str, torch.Size],
    dtype: torch.dtype,
    device: torch.device,
    state: dict[str, Tensor],
    unexpected: list[str],
    wrong: dict[str, str],
) -> None:
    """Enter one stored tensor where it belongs."""
    if name.endswith(IGNORED_SUFFIX):
        return
    if name not in expected:
        unexpected.append(name)
    elif tensor.shape != expected[name]:
        wrong[name] = f"is {_shape(tensor.shape)} where config.json says {_shape(expected[name])}"
    elif dtype_name(tensor.dtype) not in DTYPES:
        wrong[name] = f"is stored as {dtype_name(tensor.dtype)}, not as one of {', '.join(DTYPES)}"
    else:
        state[name] = tensor.to(device=device, dtype=dtype).contiguous()


def _load_quantized(
    model: XverseForCausalLM,
    path: Path,
    files: TensorFiles,
    scheme: Scheme,
    dtype: torch.dtype | None,
    device: torch.device,
    dequantize: bool,
) -> None:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    chosen = quantized_names(files, scheme)
    prefixes = tuple(f"{name}." for name in chosen)
    others = [name for name in files.names if not name.startswith(prefixes)]
    if dtype is None:
        norms = [name for name in others if name in expected and len(expected[name]) == 1]
        exact = dequantize and model.config.num_parameters() < FLOAT32_BELOW
        dtype = torch.float32 if exact or not norms else files.get(norms[0]).dtype
    state: dict[str, Tensor] = {}
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    for name in others:
        if name.endswith(".bias") and not files.get(name).any():
            continue  # AutoGPTQ writes a bias for every linear
        tensor = files.get(name)
        if tensor.dim() == 1:
            tensor = tensor.clone()  # or each norm would keep its surroundings in the file resident
        _take(name, tensor, expected, dtype, device, state, unexpected, wrong)
    known = {f"{name}.weight" for name in chosen}
    missing = [name for name in expected if name not in state and name not in wrong and name not in known]
    check_tensors(path, missing, unexpected, wrong)
    if dequantize:
        for name in chosen:
            shape = layer_of(model, name, path).weight.shape
            weight = dequantized(files, scheme, name, (shape[0], shape[1]), dtype, path)
            state[f"{name}.weight"] = weight.to(device)
    else:
        load_layers(model, files, scheme, dtype, path)
        if device.type != "cpu":
            for name in chosen:
                model.get_submodule(name).to(device)
    unknown = model.load_state_dict(state, assign=True, strict=False).unexpected_keys
    assert not unknown
    if not dequantize and isinstance(model.model.embed_tokens, nn.Embedding):
        keep_in_file(model.model.embed_tokens)


def _stored_dtype(file: Path) -> torch.dtype:
    """The dtype that a checkpoint counts as stored in: its first weight's."""
    for name, tensor in read_tensors(file, hold=True):
        if not name.endswith(IGNORED_SUFFIX):
            return tensor.dtype
    raise UserError(f"{file}: holds no tensors")


def check_tensors(path: Path, missing: list[str], unexpected: list[str], wrong: dict[str, str]) -> None:
    parts = []
    if missing:
        tied = " (a tied head? XVERSE's head is a matrix of its own)" if "lm_head.weight" in missing else ""
        parts.append(f"missing {listed(missing)}{tied}")
    if unexpected:
        parts.append(f"unexpected {listed(unexpected)}")
    if wrong:
        parts.append(listed(f"{name} {what}" for name, what in wrong.items()))
    if parts:
        raise UserError(f"{path}: the weights do not fit config.json: {'; '.join(parts)}")


def _shape(size: torch.Size) -> str:
    return "×".join(map(str, size))
