"""A GGUF file as a model directory: its config, tensors and tokenizer, for every command that takes one.

Weights are dequantised to float32 by the ``gguf`` package when they are read. Architectures: ``xverse``,
``llama``, ``qwen2`` and ``qwen3``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xverse.config import UserError
from xverse.formats.directory import ModelDirectory, check_vocabulary
from xverse.formats.gguf import NAMES, half_rows
from xverse.formats.gguf_header import Header, StoredTensor, read_header
from xverse.formats.gguf_tokenizer import tokenizer_of
from xverse.model.scaling import RopeScaling

if TYPE_CHECKING:
    from xverse.formats.schemes import Scheme
    from xverse.tokenizer import Tokenizer

ARCHITECTURES = ("xverse", "llama", "qwen2", "qwen3")
_NAMES = {stored: name for name, stored in NAMES.items()} | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_FACTORS = "rope_freqs.weight"  # llama.cpp's form of Llama 3's rope scaling
# Metadata that changes the forward pass in a way that the model lacks.
_REFUSED = ("expert_count", "attention.sliding_window", "attn_logit_softcapping", "logit_scale")


class GgufFile(ModelDirectory):
    """The model in a GGUF file. Raises UserError for a damaged file and for an unsupported architecture."""

    @cached_property
    def header(self) -> Header:
        return read_header(self.path)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The metadata as ``config.json`` would have it."""
        architecture = self.header.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"{self}: architecture {architecture!r} is not supported "
                f"(supported: {', '.join(ARCHITECTURES)})"
            )
        for key in _REFUSED:
            if self._get(key):
                raise UserError(f"{self}: {architecture}.{key} = {self._get(key)} is not supported")
        heads = self._number("attention.head_count")
        hidden = self._number("embedding_length")
        tokens = self.header.metadata.get("tokenizer.ggml.tokens") or ()
        ids = {
            f"{name}_token_id": self.header.metadata.get(f"tokenizer.ggml.{stored}_token_id")
            for name, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        return {
            "model_type": architecture,
            "vocab_size": self._get("vocab_size") or len(tokens),
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv") or heads,
            "head_dim": self._get("attention.key_length") or (hidden // heads if heads else 0),
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon") or 1e-6,
            "rope_theta": self._get("rope.freq_base") or 10000.0,
            "max_position_embeddings": self._number("context_length"),
            "rope_scaling": self._scaling(),
            "tie_word_embeddings": "output.weight" not in self.header.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.header.tensors,
            **ids,
        }

    @cached_property
    def scheme(self) -> Scheme | None:
        return None

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The ids that end a reply: the text's end, and the turn's if the file names one."""
        metadata = self.header.metadata
        ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        found = list(dict.fromkeys(index for index in ends if isinstance(index, int)))
        return {"eos_token_id": found} if found else {}

    @cached_property
    def weight_files(self) -> list[Path]:
        return [self.path]

    @property
    def plain_path(self) -> Path:
        raise self._not_plain("a GGUF file")

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.float32

    def read(self, *, hold: bool) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors.names:
            yield name, self.tensors.get(name)

    @cached_property
    def tensors(self) -> GgufTensors:  # type: ignore[override]  # the same interface
        return GgufTensors(self)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizer_of(self.header.metadata, str(self.path))
        check_vocabulary(tokenizer, self.config, self.path)
        return tokenizer

    def _get(self, key: str) -> Any:
        architecture = self.header.metadata.get("general.architecture")
        return self.header.metadata.get(f"{architecture}.{key}")

    def _number(self, key: str) -> int:
        value = self._get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"{self}: {key} is {value!r}, not a positive number")
        return value

    def _scaling(self) -> dict[str, Any] | None:
        kind, factor = self._get("rope.scaling.type"), self._get("rope.scaling.factor")
        if _FACTORS in self.header.tensors:
            return self._llama3_scaling(decoded(self.header.tensors[_FACTORS]))
        if kind in (None, "none") or not factor or factor == 1:
            return None
        if kind not in ("linear", "yarn"):
            raise UserError(f"{self}: rope scaling of type {kind!r} is not supported")
        original = self._get("rope.scaling.original_context_length")
        values = {"rope_type": kind, "factor": factor}
        return values | ({"original_max_position_embeddings": original} if original else {})

    def _llama3_scaling(self, factors: Tensor) -> dict[str, Any]:
        """The parameters that give the stored divisors of each frequency [head_dim/2]."""
        from xverse.model.rope import scaled_frequencies

        theta, count = self._get("rope.freq_base") or 10000.0, len(factors)
        plain = 1.0 / theta ** (torch.arange(count, dtype=torch.float32) / count)
        values = {
            "rope_type": "llama3",
            "factor": factors.max().item(),
            "original_max_position_embeddings": 8192,
        }
        scaling = RopeScaling.from_json(values, 8192, str(self))
        assert scaling is not None
        if not torch.allclose(plain / scaled_frequencies(plain, scaling, theta), factors, rtol=1e-3):
            raise UserError(f"{self}: {_FACTORS} is not the rope scaling of Llama 3, the only one supported")
        return values


class GgufTensors:
    """The tensors of a GGUF file under the model's names, float32, as ``TensorFiles``."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._stored: dict[str, StoredTensor] = {}
        for name, tensor in file.header.tensors.items():
            if name != _FACTORS:
                self._stored[_model_name(name)] = tensor

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def get(self, name: str) -> Tensor:
        """One tensor, dequantised to float32."""
        tensor, config = decoded(self._stored[name]), self._file.config
        # llama.cpp rotates adjacent pairs in these architectures, and halves in the others.
        if config.model_type in ("llama", "xverse") and (
            match := re.search(r"self_attn\.([qk])_proj\.", name)
        ):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            if tensor.shape[0] % (2 * heads) == 0:  # otherwise its shape is reported later
                tensor = half_rows(tensor if tensor.dim() > 1 else tensor[:, None], heads).view(tensor.shape)
        return tensor


def decoded(tensor: StoredTensor) -> Tensor:
    """A stored tensor as float32, in PyTorch's shape. Raises UserError for a type without a decoder."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(tensor.kind)
    try:
        values = quants.dequantize(_rows(tensor), kind)
    except NotImplementedError:
        raise UserError(f"{tensor.name}: type {kind.name} is not supported") from None
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(tensor.shape)


def _rows(tensor: StoredTensor) -> Any:
    """The bytes as the decoder takes them: floats by value, blocks by rows."""
    from gguf import GGMLQuantizationType

    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    kind = GGMLQuantizationType(tensor.kind)
    if kind in plain:
        return tensor.data.view(plain[kind]).reshape(tensor.shape)
    return tensor.data.reshape(*tensor.shape[:-1], -1)


def _model_name(name: str) -> str:
    """``blk.0.ffn_up.weight`` → ``model.layers.0.mlp.up_proj.weight``; an unknown name stays as it is."""
    stem, _, kind = name.rpartition(".")
    block = _BLOCK.fullmatch(stem)
    known = _NAMES.get(block[2] if block else stem)
    if known is None:
        return name
    return f"model.layers.{block[1]}.{known}.{kind}" if block else f"{known}.{kind}"
