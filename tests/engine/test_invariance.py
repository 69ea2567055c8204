"""The same bits in any company: random traffic, cached, preempted and speculated, against each one alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.studies.invariance import run_alone, run_together, traffic
from xverse.config import UserError
from xverse.engine import Engine, Speculation
from xverse.engine.settings import invariance
from xverse.formats import save_hf
from xverse.formats.quantize import load_quantizing
from xverse.formats.read import load_model
from xverse.kernels import ops
from xverse.kernels.native import library
from xverse.model.transformer import XverseForCausalLM, init_weights

pytestmark = pytest.mark.skipif(library() is None, reason="needs the kernels")


@pytest.fixture(scope="module")
def models(wide_config: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``models(kind)``: one of ``float32``, ``bfloat16``, ``int8`` and ``int4``."""
    path = tmp_path_factory.mktemp("model")
    model = XverseForCausalLM(dataclasses.replace(wide_config, intermediate_size=320))
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, path, torch.float32)

    def load(kind: str) -> XverseForCausalLM:
        if kind in ("int8", "int4"):
            return load_quantizing(path, kind, torch.float32 if kind == "int8" else torch.bfloat16)
        return load_model(path, getattr(torch, kind))

    return load


@pytest.mark.parametrize(
    "kind", [pytest.param("float32", marks=pytest.mark.thorough), "bfloat16", "int8", "int4"]
)
def test_random_traffic_gives_the_bits_of_each_request_alone(
    models: Any, tiny_tokenizer: Any, kind: str
) -> None:
    model = models(kind)
    requests = traffic(tiny_tokenizer.vocab_size, 30, seed=1, longest=120, longest_reply=100)
    kv_dtype = "int8" if kind in ("bfloat16", "int8") else "auto"
    settings: dict[str, Any] = {"kv_dtype": kv_dtype, "batch_invariant": True}
    alone = run_alone(Engine(model, tiny_tokenizer, prefix_cache_bytes=0, **settings), requests)
    crowded = Engine(
        model,
        tiny_tokenizer,
        max_batch=4,
        prefill_chunk=40,
        max_cache_tokens=256,
        speculation=Speculation(),
        **settings,
    )
    together = run_together(crowded, requests, seed=2)
    assert [index for index, one in enumerate(alone) if together[index] != one] == []
    stats = crowded.stats()
    assert stats.preemptions
    assert stats.reused_tokens
    assert stats.proposed_tokens
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    few = range(0, len(requests), 10)
    together = run_together(crowded, [requests[index] for index in few], seed=3)
    torch.set_num_threads(before)
    assert together == [alone[index] for index in few]


def test_without_it_company_changes_bits(models: Any, tiny_tokenizer: Any) -> None:
    """The comparison can fail."""
    model = models("float32")
    requests = traffic(tiny_tokenizer.vocab_size, 12, seed=1, longest=150)
    plain = Engine(model, tiny_tokenizer, prefix_cache_bytes=0, batch_invariant=False)
    alone = run_alone(plain, requests)
    together = run_together(Engine(model, tiny_tokenizer, batch_invariant=False), requests, seed=2)
    assert together != alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_depend_on_their_token_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    for inputs, outputs in ((256, 96), (1000, 130), (1408, 51), (24, 7)):
        weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
        x = torch.randn(150, inputs).to(dtype)
        whole = ops.invariant_linear(x, weight)
        exact = x.double() @ weight.double().T
        assert (whole - exact).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)
        for begin, end in ((0, 1), (3, 11), (149, 150), (17, 150), (60, 125), (1, 65)):
            torch.set_num_threads(1 + end % 2)
            assert torch.equal(ops.invariant_linear(x[begin:end], weight), whole[begin:end])
    torch.set_num_threads(before)


def test_it_is_refused_where_kernels_are_missing(tiny_model: Any, models: Any) -> None:
    assert invariance(models("int4"), None)
    assert not invariance(models("float32"), False)
    double = models("float32").double()
    assert not invariance(double, None)
    with pytest.raises(UserError, match="batch_invariant: needs a CPU"):
        invariance(double, True)
