"""Load the model of a directory: XVERSE as published, Hugging Face safetensors, Llama-named exports, and
quantised weights (compressed-tensors, GPTQ)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from xverse.config import UserError
from xverse.formats.directory import ModelDirectory
from xverse.formats.mapped import keep_in_file
from xverse.formats.schemes import Placed, Scheme, dequantized, layer_of, load_layers, quantized_names
from xverse.formats.weights import DTYPES, HEAD, IGNORED_SUFFIX, dtype_name, listed
from xverse.model import XverseForCausalLM
from xverse.model.config import FLOAT32_BELOW

_EMBEDDING = "model.embed_tokens.weight"


def load_model(
    source: str | Path | ModelDirectory,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    dequantize: bool = False,
    placed: Placed | None = None,
) -> XverseForCausalLM:
    """Load a model directory. ``dtype`` None keeps the stored dtype.

    On the CPU in the stored dtype the parameters are the memory-mapped files themselves (private pages:
    writing to them copies and never reaches the file). Otherwise tensors are converted one by one. Quantised
    matrices become ``QuantLinear`` and ``QuantEmbedding``, or with ``dequantize`` plain weights of ``dtype``
    (None: float32, which is exact; for a billion parameters or more the stored dtype of the other tensors).
    ``placed`` is called for each quantised matrix.
    Raises UserError, in one line, that lists all missing, unexpected and mis-shaped tensors, or names a
    damaged quantised one.
    """
    directory = ModelDirectory.of(source)
    device = torch.device(device)
    config = directory.config  # of a GGUF file reads tensors, so not on the meta device
    with torch.device("meta"):
        model = XverseForCausalLM(config)
    if directory.scheme is not None:
        _load_quantized(model, directory, directory.scheme, dtype, device, dequantize, placed)
        return model
    check_tied(directory)
    expected = _expected(model)
    stored = directory.stored_dtype
    dtype = dtype or stored
    state: dict[str, Tensor] = {}
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    for name, tensor in directory.read(hold=dtype == stored and device.type == "cpu"):
        if name == HEAD and HEAD not in expected:
            continue  # a tied head repeats the embedding
        _take(name, tensor, expected, dtype, device, state, unexpected, wrong)
    missing = [name for name in expected if name not in state and name not in wrong]
    check_tensors(directory.path, missing, unexpected, wrong)
    model.load_state_dict(state, assign=True, strict=HEAD in expected)
    model.tie()
    return model


def _expected(model: XverseForCausalLM) -> dict[str, torch.Size]:
    """The shapes of the tensors to read; a tied head has none of its own."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


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
    """Put one stored tensor into ``state``, ``unexpected`` or ``wrong``."""
    if name.endswith(IGNORED_SUFFIX):
        return
    if name not in expected:
        unexpected.append(name)
    elif problem := misfit(tensor, expected[name]):
        wrong[name] = problem
    else:
        state[name] = tensor.to(device=device, dtype=dtype).contiguous()


def _load_quantized(
    model: XverseForCausalLM,
    directory: ModelDirectory,
    scheme: Scheme,
    dtype: torch.dtype | None,
    device: torch.device,
    dequantize: bool,
    placed: Placed | None,
) -> None:
    path, files = directory.path, directory.tensors
    expected = _expected(model)
    chosen = quantized_names(files, scheme)
    prefixes = tuple(f"{name}." for name in chosen)
    others = [name for name in files.names if name.endswith(".bias") or not name.startswith(prefixes)]
    if dtype is None:
        norms = [name for name in others if name in expected and len(expected[name]) == 1]
        exact = dequantize and model.config.num_parameters() < FLOAT32_BELOW
        dtype = torch.float32 if exact or not norms else files.get(norms[0]).dtype
    state: dict[str, Tensor] = {}
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    for name in others:
        tensor = files.get(name)
        if name.endswith(".bias") and name not in expected and not tensor.any():
            continue  # AutoGPTQ writes a bias for every linear
        if name == HEAD and HEAD not in expected:
            continue
        if tensor.dim() == 1:
            tensor = tensor.clone()  # otherwise each norm would keep its neighbourhood in the file resident
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
        load_layers(model, files, scheme, dtype, path, device, placed)
    unknown = model.load_state_dict(state, assign=True, strict=False).unexpected_keys
    assert not unknown
    if "lm_head" not in chosen:
        model.tie()
    if not dequantize and isinstance(model.model.embed_tokens, nn.Embedding):
        keep_in_file(model.model.embed_tokens)


def misfit(tensor: Tensor, expected: torch.Size) -> str | None:
    """Why a stored tensor is not a weight of the ``expected`` shape, or None."""
    if tensor.shape != expected:
        return f"is {_shape(tensor.shape)} where config.json says {_shape(expected)}"
    if dtype_name(tensor.dtype) not in DTYPES:
        return f"is stored as {dtype_name(tensor.dtype)}, not as one of {', '.join(DTYPES)}"
    return None


def check_tied(directory: ModelDirectory) -> None:
    """Raise UserError if the head is tied according to config.json, but stored with other values than the
    embedding, which transformers would not tie."""
    files = directory.tensors
    if not directory.config.tie_word_embeddings or HEAD not in files or _EMBEDDING not in files:
        return
    if not torch.equal(files.get(HEAD), files.get(_EMBEDDING)):
        raise UserError(
            f"{directory.path}: {HEAD} is not the embedding, though config.json ties them; "
            'write "tie_word_embeddings": false'
        )


def check_tensors(path: Path, missing: list[str], unexpected: list[str], wrong: dict[str, str]) -> None:
    """Raise UserError if there are any; ``wrong`` maps names to what is wrong with them."""
    if "score.weight" in unexpected:
        raise UserError(
            f"{path}: is a reward model, which scores texts and writes none; reward_funcs takes it"
        )
    parts = []
    if missing:
        tied = " (is the head tied? config.json says that it is not)" if HEAD in missing else ""
        parts.append(f"missing {listed(missing)}{tied}")
    if unexpected:
        parts.append(f"unexpected {listed(unexpected)}")
    if wrong:
        parts.append(listed(f"{name} {what}" for name, what in wrong.items()))
    if parts:
        raise UserError(f"{path}: the weights do not fit config.json: {'; '.join(parts)}")


def _shape(size: torch.Size) -> str:
    return "×".join(map(str, size))
