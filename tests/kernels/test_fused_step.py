"""All layers in one call: the same bits as the modules one by one, and rows that do not depend on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xverse.bench.weights import random_model
from xverse.engine.cache import PagedCache, RaggedContext, SequenceCache
from xverse.kernels.fused_step import fused_step
from xverse.kernels.inference import use_kernels
from xverse.kernels.native import library
from xverse.model import XverseForCausalLM, init_weights

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not compiled")

KINDS = ["int4", "int8", "int3", "int2", "bf16", "int4 in float32", "int8 layers among int3"]


def make(config: Any, kind: str) -> XverseForCausalLM:
    if kind == "bf16":
        model = XverseForCausalLM(config).to(torch.bfloat16)
        init_weights(model, seed=0)
    elif kind == "int4 in float32":
        model = random_model(config, torch.float32, "int4")
    else:
        model = random_model(config, torch.bfloat16, kind.split()[0])
    if "among" in kind:
        model = random_model(config, torch.bfloat16, "int3")
        other = random_model(config, torch.bfloat16, "int8")
        for name in ("self_attn.k_proj", "mlp.down_proj", "mlp.up_proj"):
            parent, _, leaf = name.rpartition(".")
            target = model.get_submodule(f"model.layers.1.{parent}")
            setattr(target, leaf, other.get_submodule(f"model.layers.1.{name}"))
    use_kernels(model)
    return model.eval()


class Texts:
    """Sequences of tokens in a cache, of which the first ``lengths`` are computed."""

    def __init__(self, model: XverseForCausalLM, lengths: list[int], kv_dtype: str) -> None:
        dtype = model.model.norm.weight.dtype
        self.model = model
        self.cache = PagedCache(
            model.config, dtype, torch.device("cpu"), blocks=64, sequences=len(lengths), kv_dtype=kv_dtype
        )
        self.sequences = []
        for number, length in enumerate(lengths):
            sequence = SequenceCache(self.cache, length + 16)
            self.sequences.append(sequence)
            sequence.reserve(length + 16)
            if length:
                self.run([(number, length)])
                sequence.length = length

    def context(self, segments: list[tuple[int, int]]) -> tuple[torch.Tensor, RaggedContext]:
        tokens: list[int] = []
        for number, count in segments:
            start = self.sequences[number].length
            tokens += [4 + (7 * at + 31 * number) % 90 for at in range(start, start + count)]
        return torch.tensor(tokens), RaggedContext([(self.sequences[n], count) for n, count in segments])

    def run(self, segments: list[tuple[int, int]], native: bool = False) -> torch.Tensor:
        """Hidden states [N, D] of the next tokens of some sequences."""
        tokens, context = self.context(segments)
        with torch.inference_mode():
            if not native:
                return self.model.model(tokens[None], context)[0]
            call = fused_step(self.model, self.cache.layers)
            assert call is not None
            return call(tokens, context)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_the_modules(wide_config: Any, kind: str, kv_dtype: str) -> None:
    model = make(wide_config, kind)
    for segments in ([(0, 1)], [(0, 1), (1, 1), (2, 1)], [(2, 4), (0, 1), (1, 3)]):
        one, other = (Texts(model, [5, 0, 100], kv_dtype) for _ in range(2))
        assert torch.equal(one.run(segments, native=True), other.run(segments))
        # The cache has the same contents too: the next step reads it.
        for texts in (one, other):
            for number, count in segments:
                texts.sequences[number].length += count
        assert torch.equal(one.run([(2, 1)], native=True), other.run([(2, 1)]))


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_does_not_depend_on_the_others(
    wide_config: Any, kind: str, kv_dtype: str, threads: int
) -> None:
    """Speculative decoding relies on it: drafts are verified by the bits of single-token steps."""
    model = make(wide_config, kind)
    before = torch.get_num_threads()
    alone = Texts(model, [5, 70], kv_dtype)
    rows = []
    for _ in range(6):
        rows.append(alone.run([(1, 1)], native=True)[0])
        alone.sequences[1].length += 1
    torch.set_num_threads(threads)
    try:
        together = Texts(model, [5, 70], kv_dtype).run([(0, 2), (1, 6)], native=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together[2:], torch.stack(rows))


def test_other_models_have_no_fused_step(wide_config: Any) -> None:
    plain = XverseForCausalLM(wide_config)
    init_weights(plain, seed=0)
    use_kernels(plain)
    layers = Texts(plain, [0], "auto").cache.layers
    assert fused_step(plain, layers) is None  # float32 products run in PyTorch
    model = make(wide_config, "int4")
    layers = Texts(model, [0], "auto").cache.layers
    assert fused_step(model, layers) is not None
    model.model.layers[0].mlp.down_proj.order = torch.arange(256)
    assert fused_step(model, layers) is None  # a layer with permuted inputs
