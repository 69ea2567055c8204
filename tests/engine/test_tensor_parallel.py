"""A model divided over two processes gives what the whole model gives, with half of its weights and cache."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests import forkserver
from xverse.config import UserError
from xverse.engine import Engine, Request, SamplingParams
from xverse.engine.dividing import check_division, embedding_part, inputs_part, outputs_part
from xverse.engine.load import Loaded, load_engine
from xverse.formats import save_hf
from xverse.hardware import file_mapped
from xverse.kernels.linear import QuantEmbedding, QuantLinear
from xverse.kernels.weight import QuantizedWeight
from xverse.model import XverseForCausalLM
from xverse.model.transformer import init_weights
from xverse.plan.layout import vocabulary_part
from xverse.quant.methods import rtn, rtn_row

SETTINGS: dict[str, Any] = {"max_batch": 4, "max_cache_tokens": 192, "prefill_chunk": 40, "device": "cpu"}


def quantized(bits: int, group: int, inputs: int = 768, order: bool = False) -> QuantLinear:
    weight = torch.randn(96, inputs, generator=torch.Generator().manual_seed(bits + group))
    stored = rtn(weight, bits, group) if group else rtn_row(weight, bits)
    layer = QuantLinear.from_weight(stored, nn.Parameter(torch.randn(96)))
    if order:
        layer.order = torch.randperm(inputs, generator=torch.Generator().manual_seed(0))
    return layer


def with_table(bits: int, group: int, inputs: int = 768) -> QuantLinear:
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (96, inputs), generator=generator).to(torch.int8)
    scales = torch.rand(96, inputs // group, generator=generator).bfloat16() / 100
    table = torch.randperm(200, generator=generator)[: 2 * half].sort().values - 100
    weight = QuantizedWeight(q, scales, bits, table.to(torch.int8))
    return QuantLinear.from_weight(weight, nn.Parameter(torch.randn(96)))


LINEARS: dict[str, Any] = {
    "float32": lambda: nn.Linear(768, 96),
    "bfloat16": lambda: nn.Linear(768, 96, dtype=torch.bfloat16),
    **{
        f"int{bits}, groups of {group}": lambda b=bits, g=group: quantized(b, g)
        for bits in (4, 8)
        for group in (32, 128)
    },
    **{f"a table of {bits} bits": lambda b=bits: with_table(b, 128) for bits in (2, 3, 4)},
    "a scale for each row": lambda: quantized(8, 0),
    "activation order": lambda: quantized(4, 128, order=True),
}


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("count", [2, 4, 8])
@torch.inference_mode()
def test_parts_of_a_linear_give_the_whole(kind: str, count: int) -> None:
    whole = LINEARS[kind]()
    dtype = whole.bias.dtype
    x = torch.randn(5, 768, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = whole(x).float()
    width, rows = 768 // count, 96 // count
    by_outputs = [outputs_part(whole, range(rows * i, rows * (i + 1))) for i in range(count)]
    torch.testing.assert_close(torch.cat([part(x) for part in by_outputs], -1).float(), expected)
    total = whole.bias.float().expand(5, 96)
    for rank in range(count):
        part = inputs_part(whole, range(width * rank, width * (rank + 1)))
        own = x if getattr(part, "order", None) is not None else x[:, width * rank : width * (rank + 1)]
        total = total + part(own).float()
    # Kernels quantise inputs group by group: the groups of a part are those of the whole or smaller.
    tolerance = 0.05 if dtype == torch.bfloat16 or isinstance(whole, QuantLinear) else 1e-4
    torch.testing.assert_close(total, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_parts_of_an_embedding_are_its_rows(count: int) -> None:
    weight = torch.randn(701, 128)
    whole = QuantEmbedding.from_weight(rtn(weight, 8, 32), torch.float32)
    for layer in (whole, nn.Embedding.from_pretrained(weight)):
        tokens = torch.arange(701)
        rows = [vocabulary_part(701, rank, count) for rank in range(count)]
        assert [index for part in rows for index in part] == tokens.tolist()
        found = [embedding_part(layer, part)(torch.arange(len(part))) for part in rows]
        torch.testing.assert_close(torch.cat(found), layer(tokens), atol=0, rtol=0)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        UserError, match="40 of 160 inputs of a quantised layer do not divide into groups of 32"
    ):
        inputs_part(quantized(4, 32, inputs=160), range(40))


@pytest.mark.parametrize(
    ("count", "shape", "message"),
    [
        (3, {}, "num_attention_heads 4 does not divide by tensor 3"),
        (4, {"num_key_value_heads": 2}, "num_key_value_heads 2 does not divide by tensor 4"),
        (4, {"intermediate_size": 130}, "intermediate_size 130 does not divide by tensor 4"),
    ],
)
def test_what_does_not_divide_is_named(
    wide_config: Any, count: int, shape: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=f"--tensor-parallel {count}: {message}"):
        check_division(dataclasses.replace(wide_config, **shape), count)


@pytest.fixture(scope="module")
def directory(wide_config: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a relative's features: grouped key heads, biases, normed queries and keys, a tied head."""
    shape = dataclasses.replace(
        wide_config, model_type="qwen3", num_key_value_heads=2, head_dim=64, attention_bias=True,
        output_bias=True, qk_norm=True, tie_word_embeddings=True, intermediate_size=512,
    )  # fmt: skip
    model = XverseForCausalLM(shape)
    init_weights(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    path = tmp_path_factory.mktemp("divided") / "model"
    save_hf(model, tiny_tokenizer, path)
    return path


@pytest.fixture(scope="module", params=[None, "int4"])
def engines(request: Any, directory: Path) -> Iterator[SimpleNamespace]:
    """The whole model and the divided one."""
    settings = {**SETTINGS, "quantize": request.param}
    whole = load_engine(str(directory), **settings)
    divided = load_engine(str(directory), tensor_parallel=2, **settings)
    yield SimpleNamespace(whole=whole, divided=divided, exact=request.param is None)
    assert divided.ranks is not None
    divided.ranks.close()


def replies(loaded: Loaded, count: int, length: int, new_tokens: int) -> list[list[int]]:
    engine: Engine = loaded.engine
    handles = {}
    for number in range(count):
        ids = [(7 * place + 13 * number * (place > 40)) % 600 + 4 for place in range(length + 9 * number)]
        handles[engine.submit(Request(prompt_ids=ids, sampling=SamplingParams.greedy(new_tokens)))] = number
    found: list[list[int]] = [[] for _ in range(count)]
    while engine.busy:
        for event in engine.step():
            assert not event.error
            if event.token_id is not None:
                found[handles[event.handle]].append(event.token_id)
    return found


def test_logprobs_and_replies_are_the_whole_models(engines: SimpleNamespace) -> None:
    """In batches with a shared beginning, chunked prompts, and preemption: the cache is smaller than what the
    requests need together."""
    items = [([5 + n % 300 for n in range(90)], [[5], [9, 8, 7], [40]]), ([4], [[6, 6]])]
    found, expected = (loaded.engine.score(items) for loaded in (engines.divided, engines.whole))
    flat = [[value for item in scores for one in item for value in one] for scores in (found, expected)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-5 if engines.exact else 0.1)
    found, expected = (replies(loaded, 6, 60, 70) for loaded in (engines.divided, engines.whole))
    if engines.exact:
        assert found == expected
    assert engines.divided.engine.stats().preemptions > 0
    embeddings = [loaded.engine.embed([[5, 6, 7, 8]])[0] for loaded in (engines.divided, engines.whole)]
    assert embeddings[0] == pytest.approx(embeddings[1], abs=1e-5 if engines.exact else 0.1)


def test_a_process_holds_half(engines: SimpleNamespace) -> None:
    def size(loaded: Loaded) -> tuple[int, int]:
        tensors = {tensor.data_ptr(): tensor for tensor in loaded.engine.model.state_dict().values()}
        for start, tensor in tensors.items():  # a part that keeps the whole in memory is a mapped file's
            assert tensor.untyped_storage().nbytes() == tensor.nbytes or file_mapped(start, start + 1)
        layers = loaded.engine._cache.layers
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return sum(tensor.nbytes for tensor in tensors.values()), cache

    (weights, cache), (all_weights, all_cache) = size(engines.divided), size(engines.whole)
    assert weights <= 0.55 * all_weights
    assert 2 * cache == all_cache
    assert engines.divided.engine.model.config == engines.whole.engine.model.config


def test_the_server_ends_with_a_process(directory: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "xverse.cli",
        "serve",
        "--model",
        str(directory),
        "--port",
        "0",
        "--page",
        "none",
    ]
    command += ["--tensor-parallel", "2", "--device", "cpu", "--max-cache-tokens", "320"]
    server = forkserver.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stderr is not None
    try:
        address = server.stdout.readline().split()[-1]
        body = b'{"prompt": "a", "max_tokens": 3}'
        request = urllib.request.Request(
            f"{address}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert reply.status == 200
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        others = [
            int(pid)
            for pid in children
            if b"xverse.engine.follower" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        (other,) = others
        os.kill(other, signal.SIGKILL)
        assert server.wait(timeout=30) == 1
        line = server.stderr.read().splitlines()[-1]
        assert line == "xverse: process 1 of --tensor-parallel was ended by SIGKILL"
    finally:
        server.kill()
        server.communicate()
