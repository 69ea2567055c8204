"""A GGUF file as a model directory: its config, tensors and tokenizer, for every command that takes one.

Weights are dequantised to float32 by the ``gguf`` package when they are read. Architectures: ``xverse``,
``llama``, ``qwen2`` and ``qwen3``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from xverse.config import UserError
from xverse.formats.directory import AssembledDirectory, check_vocabulary
from xverse.formats.gguf import NAMES, PIECE, ROPE_FACTORS, SAMPLING, half_rows, in_threads
from xverse.formats.gguf_header import Header, StoredTensor, read_header
from xverse.formats.gguf_tokenizer import tokenizer_of
from xverse.log import notice
from xverse.model import XverseForCausalLM
from xverse.model.scaling import RopeScaling

if TYPE_CHECKING:
    from xverse.tokenizer import Tokenizer

ARCHITECTURES = ("xverse", "llama", "qwen2", "qwen3")
_NAMES = {stored: name for name, stored in NAMES.items()}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Metadata that changes the forward pass in a way that the model lacks, with the value that does not.
_FIXED: dict[str, Any] = {
    **dict.fromkeys(("expert_count", "attention.sliding_window", "attn_logit_softcapping"), 0),
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "attention.scale"), 0),
    **dict.fromkeys(("rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_attn_factor"), 0),
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.attn_factor": 1,
    "attention.causal": True,
}


class GgufFile(AssembledDirectory):
    """The model in a GGUF file. Raises UserError for a damaged file and for an unsupported architecture."""

    kind = "a GGUF file"
    config_name = ""

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
        heads = self._number("attention.head_count")
        hidden = self._number("embedding_length")
        head_dim = self._head_dim
        same = dict.fromkeys(
            ("attention.key_length", "attention.value_length", "rope.dimension_count"), head_dim
        )
        for key, only in {**_FIXED, **same}.items():
            if self._get(key) not in (None, only):
                raise UserError(
                    f"{self}: {architecture}.{key} = {self._get(key)} is not supported, only {only}"
                )
        tokens = self.header.metadata.get("tokenizer.ggml.tokens") or ()
        scaling = self._scaling()
        positions = self._number("context_length")
        if scaling and scaling["rope_type"] in ("linear", "yarn"):  # which it includes
            positions = self._get("rope.scaling.original_context_length") or positions
        eps = self._get("attention.layer_norm_rms_epsilon")
        if eps is None:
            raise UserError(f"{self}: has no {architecture}.attention.layer_norm_rms_epsilon")
        ids = {
            f"{name}_token_id": self._token_id(stored)
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
            "head_dim": head_dim,
            "rms_norm_eps": eps,
            "rope_theta": self._get("rope.freq_base") or 10000.0,
            "max_position_embeddings": positions,
            "rope_scaling": scaling,
            "tie_word_embeddings": "output.weight" not in self.header.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.header.tensors,
            **ids,
        }

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The ids that end a reply: the text's end, and the turn's if there is one; the sampling settings."""
        metadata = self.header.metadata
        ends = [self._token_id(name) for name in ("eos", "eot", "eom")]
        end_ids = list(dict.fromkeys(index for index in ends if index is not None))
        numbers = {name: metadata.get(key) for name, key in SAMPLING.items()}
        settings: dict[str, Any] = {k: v for k, v in numbers.items() if isinstance(v, (int, float))}
        if settings.get("temperature"):
            settings["do_sample"] = True
        return settings | ({"eos_token_id": end_ids} if end_ids else {})

    @cached_property
    def weight_files(self) -> list[Path]:
        return [self.path]

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.float32

    @cached_property
    def tensors(self) -> GgufTensors:  # type: ignore[override]  # the same interface
        return GgufTensors(self)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizer_of(self.header.metadata, str(self.path))
        check_vocabulary(tokenizer, self.config, self.path)
        return tokenizer

    def _get(self, key: str) -> Any:
        """A value of the architecture; of a list, one for each layer, the one that all layers have."""
        architecture = self.header.metadata.get("general.architecture")
        value = self.header.metadata.get(f"{architecture}.{key}")
        if isinstance(value, list) and value and value == value[:1] * len(value):
            return value[0]
        return value

    @property
    def _head_dim(self) -> Any:
        heads = self._number("attention.head_count")
        return self._get("attention.key_length") or self._number("embedding_length") // heads

    def _token_id(self, name: str) -> int | None:
        """A special token's id; None if the file has none, or one outside its vocabulary."""
        index = self.header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        count = self._get("vocab_size") or len(self.header.metadata.get("tokenizer.ggml.tokens") or ())
        if index is None or (type(index) is int and 0 <= index < count):
            return index
        notice(f"{self}: ignores {name}_token_id = {index}, which its {count} tokens do not have")
        return None

    def _number(self, key: str) -> int:
        value = self._get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"{self}: {key} is {value!r}, not a positive number")
        return value

    def _scaling(self) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type") or "linear"  # as llama.cpp has it
        factor = self._get("rope.scaling.factor") or self._get("rope.scale_linear")
        if ROPE_FACTORS in self.header.tensors:
            return self._llama3_scaling(decoded(self.header.tensors[ROPE_FACTORS]))
        if kind == "none" or not factor or factor == 1:
            return None
        if kind not in ("linear", "yarn"):
            raise UserError(f"{self}: rope scaling of type {kind!r} is not supported")
        original = self._get("rope.scaling.original_context_length")
        values = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
        if kind == "yarn":
            values |= {name: self._get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        return {name: value for name, value in values.items() if value is not None}

    def _llama3_scaling(self, factors: Tensor) -> dict[str, Any]:
        """The parameters that give the stored divisors of each frequency [head_dim/2]."""
        from xverse.model.rope import scaled_frequencies

        theta, count = self._get("rope.freq_base") or 10000.0, self._head_dim // 2
        if len(factors) != count:
            raise UserError(f"{self}: {ROPE_FACTORS} has {len(factors)} values, not {count}")
        plain = 1.0 / theta ** (torch.arange(count, dtype=torch.float32) / count)
        for length in (1 << bits for bits in range(13, 4, -1)):  # 8,192 is Llama's own
            values = {
                "rope_type": "llama3",
                "factor": factors.max().item(),
                "original_max_position_embeddings": length,
            }
            scaling = RopeScaling.from_json(values, length, str(self))
            assert scaling is not None
            if torch.allclose(plain / scaled_frequencies(plain, scaling, theta), factors, rtol=1e-3):
                return values
        raise UserError(f"{self}: {ROPE_FACTORS} is not the rope scaling of Llama 3, the only one supported")


class GgufTensors:
    """The tensors of a GGUF file under the model's names, float32, as ``TensorFiles``."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._stored: dict[str, StoredTensor] = {}
        for name, tensor in file.header.tensors.items():
            if name != ROPE_FACTORS:
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

    kind, rows, shape = GGMLQuantizationType(tensor.kind), _rows(tensor), tensor.shape
    out = np.empty(shape, np.float32)
    step = max(1, PIECE // shape[-1]) if len(shape) > 1 else shape[0]

    def piece(start: int) -> None:
        out[start : start + step] = quants.dequantize(rows[start : start + step], kind).reshape(
            out[start : start + step].shape
        )

    try:
        for _ in in_threads(piece, range(0, shape[0], step)):
            pass
    except NotImplementedError:
        raise UserError(f"{tensor.name}: type {kind.name} is not supported") from None
    return torch.from_numpy(out)


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


def open_gguf(path: str | Path) -> XverseForCausalLM:
    """The model in a GGUF file, in float32, to compare it with its source.

    Each module's weights are decoded from the memory-mapped file for the duration of its forward call, so
    that a 7B model does not take 29 GB. Raises UserError as ``GgufFile`` does.
    """
    file = GgufFile(path)
    config = file.config  # reads tensors where it has rope factors, so not on the meta device
    model = XverseForCausalLM.empty(config)
    names = set(file.tensors.names)
    tied = config.tie_word_embeddings
    for module_name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            name = f"{module_name}.{key}"
            if tied and name == "lm_head.weight":
                name = "model.embed_tokens.weight"
            names.discard(name)
            empty = torch.zeros(()).expand(parameter.shape)
            setattr(module, key, nn.Parameter(empty, requires_grad=False))
            _decode_when_needed(module, key, functools.partial(file.tensors.get, name))
    assert not names, f"tensors that no module has: {', '.join(names)}"
    return model


def _decode_when_needed(module: nn.Module, key: str, read: Callable[[], Tensor]) -> None:
    parameter = getattr(module, key)
    empty = parameter.data

    def decode(*_: Any) -> None:
        parameter.data = read()

    def forget(*_: Any) -> None:
        parameter.data = empty

    module.register_forward_pre_hook(decode)
    module.register_forward_hook(forget, always_call=True)
