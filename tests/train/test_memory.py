"""The prediction of memory against what a fresh process takes, and what happens where it does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.cli import main
from xverse.config import UserError
from xverse.model import XverseConfig
from xverse.train import TrainConfig, memory
from xverse.train.memory import check_memory, predicted_memory

SHAPE = {
    "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 6,
}  # fmt: skip
BATCH, LENGTH = 4, 384
MEASURE = """
import json, sys
import torch
from xverse.data.feed import Batch
from xverse.hardware import keep_freed_memory
from xverse.model import XverseConfig, XverseForCausalLM, init_weights
from xverse.train import TrainConfig
from xverse.train.blocks import prepare_blocks
from xverse.train.loop import train_step
from xverse.hardware import peak_memory
from xverse.train.optimizer import make_optimizer

def steps(shape, settings, batch, length, count):
    config = TrainConfig(**settings)
    model = XverseForCausalLM(XverseConfig(**shape))
    init_weights(model, 0)
    prepare_blocks(model, config)
    optimizer = make_optimizer(model, config)
    tokens = torch.randint(4, shape["vocab_size"], (batch, length))
    ids = torch.zeros_like(tokens, dtype=torch.int32)
    for _ in range(count):
        train_step(model, Batch(tokens, tokens, ids), config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

torch.set_num_threads(1)
keep_freed_memory()
job = json.loads(sys.argv[1])
small = {**job["shape"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}
steps(small, job["settings"], 4, 8, 1)  # libraries are loaded
before = peak_memory()
steps(job["shape"], job["settings"], job["batch"], job["length"], 2)
print(peak_memory() - before)
"""


def settings(**values: Any) -> dict[str, Any]:
    return {"steps": 1, "batch_size": BATCH, "learning_rate": 1e-3, **values}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "values",
    [
        {},
        pytest.param(
            {"dtype": "float32", "activation_checkpointing": "full", "optimizer": "muon"},
            marks=pytest.mark.thorough,
        ),
    ],
    ids=str,
)
def test_the_prediction_is_near_what_a_process_takes(values: dict[str, Any]) -> None:
    job = {"shape": SHAPE, "settings": settings(**values), "batch": BATCH, "length": LENGTH}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(job)], capture_output=True, text=True, check=True
    )
    predicted = predicted_memory(XverseConfig(**SHAPE), TrainConfig(**job["settings"]), LENGTH)
    assert sum(predicted.values()) == pytest.approx(int(done.stdout), rel=0.15), predicted


def test_what_saves_memory_is_predicted_to_save_it() -> None:
    def total(**values: Any) -> int:
        return sum(
            predicted_memory(XverseConfig(**SHAPE), TrainConfig(**settings(**values)), LENGTH).values()
        )

    plain = total()
    assert total(activation_checkpointing="full") < total(activation_checkpointing="selective") < plain
    assert total(micro_batch_size=1) < plain < total(dtype="float32")
    assert total(optimizer_dtype="bfloat16") < plain
    kinds = [
        predicted_memory(XverseConfig(**SHAPE), TrainConfig(**settings(optimizer_dtype=dtype)), LENGTH)
        for dtype in ("float32", "bfloat16")
    ]
    assert 2 * kinds[1]["optimizer"] == pytest.approx(kinds[0]["optimizer"], rel=0.001)


# GB without allocator, as benchmarks/parallel.md has them: mini, float32, 4 rows of 2,048 one at a time.
MEASURED = {
    "one process": 1.488, "fsdp 2": 1.249, "tensor 2": 0.831, "context 2": 0.873, "pipeline 2": 1.321,
}  # fmt: skip


def test_each_layout_is_predicted_as_it_was_measured() -> None:
    from benchmarks.studies.parallel import LAYOUTS
    from benchmarks.studies.parallel import settings as layout_settings
    from xverse.model import named_shape

    for name, degrees in LAYOUTS.items():
        processes = 1 if name == "one process" else 2
        config = layout_settings(4, "none" if processes == 1 else "fsdp", degrees)
        predicted = predicted_memory(named_shape("mini"), config, 2048, processes)
        # The measurements are of a processor with products of bfloat16.
        total = sum(predicted.values()) - predicted["allocator"] - predicted.get("conversion", 0)
        assert total / 1e9 == pytest.approx(MEASURED[name], rel=0.15), (name, predicted)


def test_a_mesh_divides_what_its_processes_share() -> None:
    shape = XverseConfig(**{**SHAPE, "num_hidden_layers": 4})
    config = TrainConfig(
        **settings(batch_size=16, micro_batch_size=1, parallel="fsdp", dtype="float32"),
        tensor=2, pipeline=2, context=2, virtual_stages=1,
    )  # fmt: skip
    d, f, v = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    layer = (
        4 * d * d + 3 * d * f + 2 * d
    ) // 2  # of each tensor process, as the end; 2 layers and 1 end here
    owned, end = 2 * layer + v * d // 2, v * d // 2
    predicted = predicted_memory(shape, config, LENGTH, processes=16)
    shards = 4  # shard 2 × context 2
    assert predicted["parameters"] == pytest.approx(4 * owned / shards + 4 * end + 4 * 2 * layer, rel=0.001)
    assert predicted["optimizer"] == pytest.approx(8 * owned / shards, rel=0.001)
    assert predicted["gradients"] == pytest.approx(8 * end + 4 * owned, rel=0.001)  # whole until the last
    half = predicted_memory(shape, config, 2 * LENGTH, processes=16)["activations"]
    assert half > 1.9 * predicted["activations"]


def test_no_layout_is_advised_that_the_trainer_refuses() -> None:
    config = TrainConfig(**settings(batch_size=8, micro_batch_size=2, parallel="fsdp", pipeline=2))
    with pytest.raises(UserError, match="use a smaller shape"):
        check_memory(XverseConfig(**{**SHAPE, "num_hidden_layers": 4}), config, LENGTH, 4, available=10**6)
    with pytest.raises(UserError, match="batch_size 4 does not divide into 3 processes"):
        check_memory(XverseConfig(**SHAPE), TrainConfig(**settings(parallel="ddp")), LENGTH, 3)


def test_what_does_not_fit_is_refused_with_settings_that_would() -> None:
    shape, config = XverseConfig(**SHAPE), TrainConfig(**settings())
    predicted = sum(check_memory(shape, config, LENGTH, available=10**12).values())
    with pytest.raises(UserError) as caught:
        check_memory(shape, config, LENGTH, available=predicted - 1)
    said = str(caught.value)
    assert "it fits with micro_batch_size: 2 (train.check_memory: false" in said
    changed = TrainConfig(**settings(micro_batch_size=2))
    assert sum(predicted_memory(shape, changed, LENGTH).values()) < predicted
    least = TrainConfig(
        **settings(micro_batch_size=1, activation_checkpointing="full", optimizer_dtype="bfloat16")
    )
    tight = sum(predicted_memory(shape, least, LENGTH).values())
    with pytest.raises(UserError, match=r"fits with .*full and optimizer_dtype: bfloat16"):
        check_memory(shape, config, LENGTH, available=tight)
    with pytest.raises(UserError, match="use a smaller shape"):
        check_memory(shape, config, LENGTH, available=10**6)
    check_memory(shape, TrainConfig(**settings(check_memory=False)), LENGTH, available=10**6)


def test_a_run_that_does_not_fit_ends_before_it_begins(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    assert main(["pretrain", str(write_recipe(steps=2))]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("xverse: one process needs 0.")
    assert not (tmp_path / "run").exists()


def test_training_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from xverse.device import compute_device
    from xverse.train.parallel import world_of

    with world_of("none") as world:
        assert world.device == compute_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with world_of("none") as world:
        assert world.device == torch.device("cuda", 0)
