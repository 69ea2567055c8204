"""Write a model as a GGUF file for llama.cpp and programs based on it.

XVERSE's architecture is ``llama``, not llama.cpp's own ``xverse``: both compute the same graph (norms
multiply by their weight in float32, as in XVERSE), and every GGUF reader knows ``llama``. In it GGUF orders
the rows of the query and key projections for rotating adjacent pairs; models order them for rotating halves.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the ``gguf`` package writes the header and
does the arithmetic of the block types.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from xverse.config import UserError, choose
from xverse.files import atomic_file, check_writable
from xverse.formats.directory import check_vocabulary
from xverse.formats.gguf_vocabulary import add_tokenizer, vocabulary_of
from xverse.formats.spm import Vocabulary
from xverse.log import console, progress
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.model.rope import scaled_frequencies
from xverse.model.scaling import RopeScaling

if TYPE_CHECKING:
    import gguf

    from xverse.tokenizer import Tokenizer

# --type → gguf's name of the file type. Norms are float32 in all of them.
KINDS = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}  # fmt: skip
# model_type → architecture; Mistral, InternLM and others are Llama's graph.
ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3"}
SAMPLING = {  # key of generation_config.json → key of the file
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
ROPE_FACTORS = "rope_freqs.weight"  # llama.cpp's form of Llama 3's rope scaling
# The largest magnitude of each type: float16's, or that of a block with a float16 scale.
LARGEST = {"f16": 65504.0, "bf16": 3.3e38, "q8_0": 127 * 65504.0, "q4_0": 8 * 65504.0}
BLOCK = 32  # weights that share a scale in q8_0 and q4_0
PIECE = 2**22  # weights converted at a time
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROTATED = re.compile(r"\.attn_([qk])\.")


def save_gguf(
    model: XverseForCausalLM,
    tokenizer: Tokenizer,
    path: str | Path,
    kind: str = "f16",
    name: str = "",
    licence: str = "",
    generation_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Vocabulary:
    """Write the file ``path`` in one of ``KINDS``; returns the vocabulary written to it.

    Weights of any float dtype are converted a few million at a time. In q8_0 and q4_0, matrices whose rows
    are not a multiple of 32 long are float16; q4_0 stores embedding and head as q8_0. ``generation_config``
    gives the sampling defaults that llama.cpp reads, ``licence`` is an SPDX expression. Raises UserError for
    an unknown kind, a weight that the kind cannot hold, a tokenizer without byte tokens, and if the file
    cannot or must not be written; then nothing is left there.
    """
    path = Path(path)
    file_type = choose("type", kind, KINDS)
    check_file(path, overwrite)
    check_vocabulary(tokenizer, model.config, path)
    model.config.without_experts("GGUF")
    architecture = ARCHITECTURES.get(model.config.model_type, "llama")
    _check_scaling(model.config.rope_scaling)
    vocabulary = vocabulary_of(tokenizer, model.config.vocab_size)
    tensors = {gguf_name(key): tensor for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    factors = _rope_factors(model.config)
    if factors is not None:
        tensors[ROPE_FACTORS] = factors
    kinds = {key: _kind(key, tensor, kind) for key, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        import gguf

        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _describe(writer, model.config, name or path.stem, licence, generation_config or {})
            writer.add_file_type(gguf.LlamaFileType[file_type])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_tokenizer(writer, vocabulary, tokenizer, model.config, generation_config or {})
            for key, tensor in tensors.items():
                stored = gguf.GGMLQuantizationType[kinds[key].upper()]
                weights, size = gguf.GGML_QUANT_SIZES[stored]  # of a block
                size *= tensor.numel() // weights
                writer.add_tensor_info(key, tensor.shape, np.dtype(np.float32), size, stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        # Not by the library, whose error does not show that a disk is full.
        with temporary.open("ab") as file, progress(disable=not console.is_terminal) as bar:
            for key, tensor in bar.track(tensors.items(), description="tensors"):
                _pad(file)
                _write(file, key, _for_gguf(key, tensor, model.config), kinds[key])
            _pad(file)
    return vocabulary


def check_file(path: Path, overwrite: bool) -> None:
    """Raise UserError if ``path`` is not a GGUF file name, or exists and must not be overwritten."""
    if path.suffix != ".gguf":
        raise UserError(f"{path}: the name of a GGUF file must end in .gguf")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name the file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: already exists; --overwrite replaces it")
    check_writable(path.parent)


def licence_of(directory: Path) -> str:
    """``license`` in the model card of ``directory``, or an empty string."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = text.removeprefix("---\n").partition("\n---")[0] if text.startswith("---\n") else ""
    match = re.search(r"^license: *(\S+) *$", front, re.MULTILINE)
    return match[1] if match else ""


def gguf_name(name: str) -> str:
    """``model.layers.0.mlp.up_proj.weight`` → ``blk.0.ffn_up.weight``."""
    layer = _LAYER.fullmatch(name)
    prefix, rest = (f"blk.{layer[1]}.", layer[2]) if layer else ("", name)
    module, _, kind = rest.rpartition(".")
    return f"{prefix}{NAMES[module]}.{kind}"


def pair_rows(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows [heads · head_dim, D] from rotation of halves to rotation of adjacent pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def half_rows(weight: Tensor, heads: int) -> Tensor:
    """The inverse of ``pair_rows``."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _for_gguf(name: str, tensor: Tensor, config: XverseConfig) -> Tensor:
    """Of a query or key projection the rows as the architecture rotates them; others as they are."""
    rotated = _ROTATED.search(name)
    if rotated is None or config.model_type in ARCHITECTURES:
        return tensor
    heads = config.num_attention_heads if rotated[1] == "q" else config.num_key_value_heads
    return pair_rows(tensor if tensor.dim() > 1 else tensor[:, None], heads).view(tensor.shape)


def _rope_factors(config: XverseConfig) -> Tensor | None:
    """By what Llama 3's rope scaling divides each frequency, float32 [head_dim/2]; None without it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None
    count = config.head_dim // 2
    plain = 1.0 / config.rope_theta ** (torch.arange(count, dtype=torch.float32) / count)
    return plain / scaled_frequencies(plain, scaling, config.rope_theta)


def _describe(
    writer: gguf.GGUFWriter,
    config: XverseConfig,
    name: str,
    licence: str,
    generation_config: Mapping[str, Any],
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.attention_size != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    import gguf

    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type != "llama3":
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
        original = scaling.original_max_position_embeddings or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
    for key, stored in SAMPLING.items():
        value = generation_config.get(key)
        if isinstance(value, (int, float)):
            if key == "top_k":
                writer.add_int32(stored, int(value))
            else:
                writer.add_float32(stored, value)


def _check_scaling(scaling: RopeScaling | None) -> None:
    if scaling is None or scaling.rope_type in ("linear", "llama3"):
        return
    default = RopeScaling(rope_type=scaling.rope_type, factor=scaling.factor)
    if scaling.rope_type == "dynamic":
        raise UserError("GGUF has no dynamic rope scaling; use linear or yarn scaling, or none")
    for name, value in scaling.to_json().items():
        if name != "original_max_position_embeddings" and value != getattr(default, name):
            raise UserError(f"GGUF: rope scaling with {name} = {value} is not supported")


def _kind(name: str, tensor: Tensor, kind: str) -> str:
    """The type of one tensor in a file of ``kind``."""
    if tensor.dim() == 1:
        return "f32"
    if kind in ("q8_0", "q4_0") and tensor.shape[-1] % BLOCK:
        return "f16"
    # In 4 bits these two alone would cost nano seven times the KL divergence of all its layers.
    return "q8_0" if kind == "q4_0" and name in ("token_embd.weight", "output.weight") else kind


def _pad(file: BinaryIO) -> None:
    from gguf import GGUF_DEFAULT_ALIGNMENT

    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))


def _write(file: BinaryIO, name: str, tensor: Tensor, kind: str) -> None:
    rows = max(1, PIECE // tensor.shape[-1])
    pieces = tensor.detach().split(rows) if tensor.dim() > 1 else [tensor.detach()]
    for encoded in in_threads(lambda piece: _encode(name, piece, kind), pieces):
        file.write(encoded.data)


def _encode(name: str, piece: Tensor, kind: str) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType, quants

    values = piece.cpu().float()
    largest = values.abs().max().item()
    if not largest <= LARGEST.get(kind, float("inf")):  # `not <=` catches NaN
        hint = "; bf16 holds it" if largest <= LARGEST["bf16"] else ""
        raise UserError(f"{name}: {kind} cannot hold a weight of magnitude {largest:.3g}{hint}")
    if kind in ("f16", "bf16"):
        half = values.to(torch.float16 if kind == "f16" else torch.bfloat16)
        return half.contiguous().view(torch.uint8).numpy()
    array = values.contiguous().numpy()
    return array if kind == "f32" else quants.quantize(array, GGMLQuantizationType[kind.upper()])


def in_threads(function: Callable[[Any], Any], pieces: Any) -> Iterator[Any]:
    """``map(function, pieces)`` in threads; numpy releases the interpreter lock."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Any] = []
        for piece in pieces:
            waiting.append(pool.submit(function, piece))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
