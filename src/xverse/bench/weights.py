"""Random weights and a placeholder tokenizer, to measure a shape without its weights."""

from __future__ import annotations

import json

import torch

from xverse.formats.quantize import quick_settings
from xverse.formats.schemes import set_layer
from xverse.kernels.linear import QuantLinear
from xverse.kernels.tiles import tile_rows
from xverse.model import XverseConfig, XverseForCausalLM
from xverse.quant.settings import matrices
from xverse.tokenizer import SPECIAL_TOKENS, Tokenizer
from xverse.tokenizer.tokenizer import SPACE


def random_model(config: XverseConfig, dtype: torch.dtype, quantize: str | None = None) -> XverseForCausalLM:
    """A model of random weights, generated quickly by repeating a block of normal values; norm weights are 1.

    With ``quantize`` (``int8``, ``int4``) the linears hold random integers in the kernels' tiles.
    """
    model = XverseForCausalLM.empty(config)
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(1 << 20).normal_(0.0, 0.02, generator=generator).to(dtype)
    if quantize:
        settings = quick_settings(quantize, config)
        head = ("lm_head", config.vocab_size, config.hidden_size)
        for name, outputs, inputs in [*matrices(config), head]:
            bits = settings.resolved_head_bits if name == "lm_head" else settings.bits
            set_layer(model, name, _random_layer(outputs, inputs, bits, settings.group_size))
    state = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        tensor = torch.ones(parameter.shape, dtype=dtype)
        if parameter.dim() > 1:
            rolled = block.roll(number * 7919)  # another start for each tensor
            for part in tensor.view(-1).split(len(block)):
                part.copy_(rolled[: len(part)])
        state[name] = tensor
    model.load_state_dict(state, assign=True, strict=False)  # tiles are filled already
    return model


def _random_layer(outputs: int, inputs: int, bits: int, group_size: int) -> QuantLinear:
    """A quantised layer whose weights have a standard deviation of 0.02."""
    rows = torch.randint(0, 256, (outputs, inputs * bits // 8), dtype=torch.uint8)
    scales = torch.full((outputs, inputs // group_size), 0.02 * 12**0.5 / 2**bits, dtype=torch.bfloat16)
    with torch.device("meta"):
        layer = QuantLinear(inputs, outputs, bits, group_size)
    layer.tiles = tile_rows(rows, scales, bits)
    return layer


def placeholder_tokenizer(size: int) -> Tokenizer:
    """A tokenizer of XVERSE's structure with ``size`` meaningless entries, so that the engine can decode the
    ids of a model with random weights."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    texts = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    assert size >= len(texts), f"a vocabulary of {size} is too small for the byte tokens"
    texts.append(SPACE)  # so that a space survives decoding
    texts += [f"{SPACE}{number:06d}" for number in range(size - len(texts))]
    vocab = {text: number for number, text in enumerate(texts)}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True, unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(json.loads(backend.to_str()))
