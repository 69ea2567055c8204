"""Starting up: of the whole model no process holds more than its share and one parameter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.config import UserError
from xverse.data.feed import PretrainFeed
from xverse.formats import load_model, save_hf
from xverse.model import XverseConfig, XverseForCausalLM, init_weights, named_shape
from xverse.tokenizer import Tokenizer
from xverse.train import TrainConfig, fit
from xverse.train.materialise import initial_weights, stored_model
from xverse.train.parallel import ALONE, distribute

CONFIG: dict[str, Any] = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "dtype": "float32"}

PROGRAM = """
import ctypes
import json
import sys
from pathlib import Path
from xverse.hardware import process_memory
from xverse.model import XverseForCausalLM, named_shape
from xverse.train import TrainConfig
from xverse.train.materialise import initial_weights, stored_model
from xverse.train.parallel import distribute, whole, world_of

config = TrainConfig(**{config!r}, parallel="fsdp")
figures = {{}}
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
with world_of("fsdp") as world:
    for name in ("libraries", "made", "read"):  # the first one brings libraries in
        if name != "read":
            shape = named_shape("mini" if name == "made" else "nano")
            model, weights = XverseForCausalLM.empty(shape), initial_weights(shape, 0)
        else:
            model, weights = stored_model(Path({source!r}))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = process_memory("VmRSS")
        replica = distribute(model, config, world, weights)
        figures[name] = process_memory("VmHWM") - before
        held = sum(p.to_local().nbytes for p in model.parameters())
        del replica, model, weights
    Path({out!r} + str(world.rank)).write_text(json.dumps(figures | {{"held": held}}))
"""


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A directory with 153 MB of float32 weights."""
    model = XverseForCausalLM(named_shape("mini"))
    init_weights(model, seed=0)
    path = tmp_path_factory.mktemp("mini") / "model"
    save_hf(model, tiny_tokenizer, path, torch.float32)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_a_start_takes_the_shards_and_one_parameter(
    torchrun: Callable[..., Any], tmp_path: Path, mini: Path
) -> None:
    text = PROGRAM.format(config=CONFIG, source=str(mini), out=str(tmp_path / "figures"))
    started = torchrun(2, script=text)
    said, _ = started.communicate()
    assert started.returncode == 0, said
    shape = named_shape("mini")
    whole = 4 * shape.num_parameters()
    largest = 4 * shape.vocab_size * shape.hidden_size
    for rank in (0, 1):
        found = json.loads((tmp_path / f"figures{rank}").read_text())
        assert found["held"] < 0.51 * whole
        for name in ("made", "read"):
            assert found[name] < found["held"] + 1.2 * largest, (name, found)
            assert found[name] < 0.8 * whole, (name, found)


def test_weights_in_turn_are_those_of_the_whole(tiny_shape: dict[str, int]) -> None:
    shape = XverseConfig(**tiny_shape)
    expected = XverseForCausalLM(shape)
    init_weights(expected, seed=3)
    model = XverseForCausalLM.empty(shape)
    distribute(model, TrainConfig(**CONFIG), ALONE, initial_weights(shape, seed=3))
    assert not expected.model.embed_tokens.weight[shape.pad_token_id].any()
    found = dict(model.named_parameters())
    assert list(found) == [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter), name
        assert found[name].requires_grad


def test_a_run_that_goes_on_makes_no_weights(
    feed: PretrainFeed, tiny_shape: dict[str, int], tmp_path: Path
) -> None:
    """Its checkpoint has them all."""
    shape, config = XverseConfig(**tiny_shape), TrainConfig(**CONFIG, preflight="off")

    def asked() -> Iterator[Any]:
        raise AssertionError("weights were made")
        yield

    first, again = XverseForCausalLM.empty(shape), XverseForCausalLM.empty(shape)
    fit(first, feed.batch, config, tmp_path, weights=initial_weights(shape, seed=0))
    fit(again, feed.batch, config, tmp_path, weights=asked())
    for name, parameter in first.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_half_precision_is_read_into_float32(
    tmp_path: Path, tiny_model: XverseForCausalLM, tiny_tokenizer: Tokenizer
) -> None:
    save_hf(tiny_model, tiny_tokenizer, tmp_path / "half", torch.bfloat16)
    before = (tmp_path / "half" / "model.safetensors").read_bytes()
    model, weights = stored_model(tmp_path / "half")
    distribute(model, TrainConfig(**CONFIG), ALONE, weights)
    for name, parameter in load_model(tmp_path / "half", torch.float32).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert (tmp_path / "half" / "model.safetensors").read_bytes() == before


def test_quantised_weights_are_refused(tmp_path: Path, tiny_shape: dict[str, int]) -> None:
    config = XverseConfig(**tiny_shape).to_json() | {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised; train the model that they were"):
        stored_model(tmp_path)
