"""Load the model of a directory: XVERSE as published, Hugging Face safetensors, Llama-named exports, and
quantised weights (compressed-tensors, GPTQ)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from xverse.config import UserError
from xverse.formats.directory import ModelDirectory
from xverse.formats.mapped import keep_in_file
from xverse.formats.schemes import Placed, Scheme, dequantized, layer_of, load_layers, quantized_names
from xverse.formats.weights import HEAD, IGNORED_SUFFIX, check_tensors, misfit
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
    model = XverseForCausalLM.empty(config)
    if directory.scheme is not None:
        _load_quantized(model, directory, directory.scheme, dtype, device, dequantize, placed)
        return model
    check_tied(directory)
    taken = _Taken(model)
    dtype = dtype or directory.stored_dtype
    for name, tensor in directory.read():
        taken.take(name, tensor, dtype, device)
    taken.check(directory.path)
    model.load_state_dict(taken.state, assign=True, strict=HEAD in taken.expected)
    model.tie()
    return model


class _Taken:
    """The tensors of a model that were read, and what does not fit it."""

    def __init__(self, model: XverseForCausalLM) -> None:
        self.expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._ignored: tuple[str, ...] = (IGNORED_SUFFIX,)
        if model.config.tie_word_embeddings:  # a stored head repeats the embedding
            del self.expected[HEAD]
            self._ignored += (HEAD,)
        self.state: dict[str, Tensor] = {}
        self._unexpected: list[str] = []
        self._wrong: dict[str, str] = {}

    def take(self, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        if name.endswith(self._ignored):
            return
        if name not in self.expected:
            self._unexpected.append(name)
        elif what := misfit(tensor, self.expected[name]):
            self._wrong[name] = what
        else:
            self.state[name] = tensor.to(device=device, dtype=dtype).contiguous()

    def check(self, path: Path, others: Collection[str] = ()) -> None:
        """Raise UserError for what does not fit and what is missing, except ``others``."""
        read = (self.state, self._wrong, others)
        missing = [name for name in self.expected if not any(name in names for names in read)]
        check_tensors(path, missing, self._unexpected, self._wrong)


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
    taken = _Taken(model)
    chosen = quantized_names(files, scheme)
    prefixes = tuple(f"{name}." for name in chosen)
    others = [name for name in files.names if name.endswith(".bias") or not name.startswith(prefixes)]
    if dtype is None:
        norms = [name for name in others if len(taken.expected.get(name, ())) == 1]
        exact = dequantize and model.config.num_parameters() < FLOAT32_BELOW
        dtype = torch.float32 if exact or not norms else files.get(norms[0]).dtype
    for name in others:
        tensor = files.get(name)
        if name.endswith(".bias") and name not in taken.expected and not tensor.any():
            continue  # AutoGPTQ writes a bias for every linear
        if tensor.dim() == 1:
            tensor = tensor.clone()  # otherwise each norm would keep its neighbourhood in the file resident
        taken.take(name, tensor, dtype, device)
    taken.check(path, {f"{name}.weight" for name in chosen})
    if dequantize:
        for name in chosen:
            shape = layer_of(model, name, path).weight.shape
            weight = dequantized(files, scheme, name, (shape[0], shape[1]), dtype, path)
            taken.state[f"{name}.weight"] = weight.to(device)
    else:
        load_layers(model, files, scheme, dtype, path, device, placed)
    unknown = model.load_state_dict(taken.state, assign=True, strict=False).unexpected_keys
    assert not unknown
    if "lm_head" not in chosen:
        model.tie()
    if not dequantize and isinstance(model.model.embed_tokens, nn.Embedding):
        keep_in_file(model.model.embed_tokens)


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
