"""Each layout of two and four processes computes what one process does, and reads the others' checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests import forkserver
from tests.scale import ALL
from xverse.config import UserError
from xverse.model import named_shape
from xverse.plan.layout import Layout
from xverse.train import TrainConfig
from xverse.train.parallel import different_kinds
from xverse.train.plot import read_metrics
from xverse.train.settings import layout_of

from . import processes

pytestmark = pytest.mark.slow

# name: (processes, keys of TrainConfig); fsdp is over what the other degrees leave
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP": (2, {}),
    "TP": (2, {"tensor": 2}),
    "CP": (2, {"context": 2, "micro_batch_size": 4}),
    "PP": (2, {"pipeline": 2, "micro_batch_size": 2}),
    "DDP": (4, {"parallel": "ddp", "micro_batch_size": 1}),
    "HSDP": (4, {"replicate": 2}),
    "TP × FSDP": (4, {"tensor": 2}),
    "CP × FSDP": (4, {"context": 2}),
    "TP × CP": (4, {"tensor": 2, "context": 2}),
    "PP × FSDP": (4, {"pipeline": 2, "micro_batch_size": 2}),
}
if not ALL:  # the others combine these
    for each in ("DDP", "CP × FSDP", "TP × FSDP", "PP × FSDP", "TP × CP"):
        del LAYOUTS[each]


# (shape, layout) of two processes, with shapes of XVERSE's relatives
FAMILY_LAYOUTS = [("tied", "FSDP"), ("tied", "TP"), ("tied", "CP"), ("family", "PP")][0 if ALL else 2 :]


def job(name: str, out: Path, **more: Any) -> dict[str, Any]:
    return {"out": str(out), "train": {"parallel": "fsdp", "steps": 5, **LAYOUTS[name][1]}, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each layout by its name, the runs ``one`` and ``long`` of a single process, and
    ``chain``, as long as ``long``, begun by one process and taken over by one layout after another for one
    step each. After that each layout of other shards reads the checkpoints of all."""
    folder = tmp_path_factory.mktemp("layouts")
    for shape in ("tied", "family"):
        processes.train({"out": str(folder / shape), "train": {"steps": 4}, "shape": shape})
    chain, stop, often = folder / "chain", 1, {"checkpoint_every": 1, "validate_every": 0}
    processes.train({"out": str(folder / "one"), "train": {"steps": 5}})
    length = len(LAYOUTS)  # of the chain, in which HSDP covers FSDP
    processes.train({"out": str(folder / "long"), "train": {"steps": length}})
    processes.train({"out": str(chain), "train": {"steps": length, **often}, "stop": stop})
    # DDP holds what one process holds, CP what FSDP does, and TP × CP what TP × FSDP does.
    others = [name for name in LAYOUTS if name not in ("DDP", "CP", "TP × CP")]
    sources = [str(folder / name / "checkpoints" / "step-00000005") for name in ("one", *others)]
    phases: list[dict[str, Any]] = []
    for count in (2, 4):
        names = [name for name, (size, _) in LAYOUTS.items() if size == count]
        jobs = [job(name, folder / name) for name in names]
        for name in names[count == 2 :]:
            stop += 1
            each = job(name, chain, stop=stop)
            jobs.append({**each, "train": {**each["train"], "steps": length, **often}})
        if count == 2:
            for shape, layout in FAMILY_LAYOUTS:
                each = job(layout, folder / f"{shape} {layout}", shape=shape)
                jobs.append({**each, "train": {**each["train"], "steps": 4}})
            jobs.append(job("PP", folder / "tied PP", shape="tied"))
        phases.append({"processes": count, "jobs": jobs})
    for count in (4, 2):
        names = [name for name in others if LAYOUTS[name][0] == count]
        phases.append({"processes": count, "jobs": [job(name, folder, load=sources) for name in names]})
    phases[-1]["jobs"].append({"out": str(folder / "wrong"), "train": {"parallel": "fsdp", "tensor": 3}})
    file = folder / "phases.json"
    file.write_text(json.dumps(phases))
    done = forkserver.run(
        [sys.executable, processes.__file__, str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return folder


def curve(out: Path) -> list[tuple[int, float, float]]:
    records = [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def check(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    assert [step for step, _, _ in found] == [step for step, _, _ in expected]
    for (step, loss, norm), (_, wanted, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5), step
        assert norm == pytest.approx(wanted_norm, rel=1e-5), step


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, runs: Path) -> None:
    one = curve(runs / "one")
    assert len(one) == 5
    assert all(norm > processes.BASE["grad_clip"] for _, _, norm in one)
    check(curve(runs / name), one)
    validations = [
        [record["valid"] for record in read_metrics(out / "metrics.jsonl") if "valid" in record]
        for out in (runs / name, runs / "one")
    ]
    assert len(validations[0]) == 1
    for figures, wanted in zip(*validations, strict=True):  # shared among data-parallel processes
        assert set(figures) == {"loss", "long", "short"}
        assert figures == pytest.approx(wanted, rel=1e-5)
    expected = load_file(runs / "one" / "model.safetensors")
    found = load_file(runs / name / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert_close(tensor, expected[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("shape", "name"), FAMILY_LAYOUTS)
def test_relatives_equal_one_process(shape: str, name: str, runs: Path) -> None:
    one, out = runs / shape, runs / f"{shape} {name}"
    assert len(curve(one)) == 4
    check(curve(out), curve(one))
    expected, found = (load_file(path / "model.safetensors") for path in (one, out))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert_close(tensor, expected[key], atol=1e-4, rtol=0)
    if shape == "tied":
        assert found["lm_head.weight"].equal(found["model.embed_tokens.weight"])


def test_a_tied_head_is_not_divided_among_stages(runs: Path) -> None:
    for rank in (0, 1):
        assert "tie_word_embeddings" in (runs / f"tied PP.{rank}.error").read_text()


def test_checkpoints_go_from_layout_to_layout(runs: Path) -> None:
    """One after the other takes a run over, and the last one ends it. (That each reads the others' tensors
    exactly is asserted in the processes.)"""
    check(curve(runs / "chain"), curve(runs / "long"))


def test_each_process_writes_what_it_holds(runs: Path) -> None:
    written = {"HSDP": 2, "TP × CP": 4, "TP × FSDP": 4, "PP × FSDP": 4}  # of copies the first
    for name in written.keys() & LAYOUTS.keys():
        files = list((runs / name / "checkpoints" / "step-00000005").glob("*.safetensors"))
        total = sum(file.stat().st_size for file in files)
        one = sum(
            file.stat().st_size for file in (runs / "one" / "checkpoints/step-00000005").glob("*.safetensors")
        )
        assert len(files) == written[name]
        assert total < 1.1 * one, "nothing is written twice"


def test_a_wrong_mesh_is_one_line_in_every_process(runs: Path) -> None:
    for rank in (0, 1):
        assert (runs / f"wrong.{rank}.error").read_text() == (
            "tensor 3 does not divide 2 processes; the nearest that works on 2: "
            "pipeline: 1, replicate: 1, context: 1, tensor: 2"
        )
    assert not (runs / "wrong").exists()


@pytest.mark.parametrize(
    ("processes", "train", "length", "said"),
    [
        (2, {"batch_size": 3}, None, "batch_size 3 does not divide into 2 processes; the nearest"),
        (
            8,
            {"tensor": 8},
            None,
            "num_attention_heads 4 does not divide by tensor 8; the nearest that works on 8: "
            "pipeline: 1, replicate: 1, context: 1, tensor: 4",
        ),
        (
            4,
            {"pipeline": 4, "micro_batch_size": 1},
            None,
            "num_hidden_layers 6 do not divide into pipeline 4 × virtual_stages 2 = 8 stages; "
            "the nearest that works on 4: pipeline: 2, virtual_stages: 1",
        ),
        (
            3,
            {"pipeline": 3, "micro_batch_size": 8},
            None,
            "pipeline 3 needs at least 3 micro-batches, but the 16 rows of a process are 2 of "
            "micro_batch_size 8; the nearest that works on 3: pipeline: 3, virtual_stages: 2, replicate: 1, "
            "context: 1, tensor: 1, micro_batch_size: 4",
        ),
        (
            4,
            {"context": 4},
            100,
            "sequence_length 100 does not divide into 2 × context 4 = 8 chunks; the nearest that works on 4: "
            "pipeline: 1, replicate: 1, context: 2, tensor: 1",
        ),
        (4, {"tensor": 4}, 102, "sequence_length 102 does not divide by context 1 × tensor 4; the nearest"),
        (
            2,
            {"pipeline": 2, "virtual_stages": 1, "batch_size": 10, "micro_batch_size": 2},
            None,
            "pipeline 2 needs 2 equal rounds, into which 5 micro-batches of micro_batch_size 2 do not divide",
        ),
        (
            6,
            {"tensor": 2, "replicate": 2},
            None,
            "replicate 2 × tensor 2 = 4 does not divide 6 processes; the nearest",
        ),
    ],
)
def test_layouts_that_do_not_divide(
    processes: int, train: dict[str, Any], length: int | None, said: str
) -> None:
    """Each names its numbers, and the layout proposed does work."""
    settings = {"steps": 1, "batch_size": 16, "learning_rate": 1.0, "parallel": "fsdp", **train}
    with pytest.raises(UserError) as error:
        layout_of(TrainConfig(**settings), processes, named_shape("nano"), length)
    assert str(error.value).startswith(said)
    proposal = str(error.value).partition(f"the nearest that works on {processes}: ")[2]
    for pair in filter(None, proposal.split(", ")):
        key, _, value = pair.partition(": ")
        settings[key] = int(value)
    layout = layout_of(TrainConfig(**settings), processes, named_shape("nano"), length)
    assert layout.processes == processes


def test_places_of_processes() -> None:
    """Neighbours share tensors, then context; rows are told apart by the data place alone."""
    layout = Layout(pipeline=2, replicate=2, shard=3, context=2, tensor=2)
    places = [layout.place(rank) for rank in range(layout.processes)]
    assert len(set(places)) == layout.processes == 48
    assert places[:5] == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1), (0, 1, 0, 0)]
    assert {data for _, data, _, _ in places} == set(range(6))


def test_devices_of_different_kinds() -> None:
    assert different_kinds(["NVIDIA H100"] * 4) == ""
    assert different_kinds(["NVIDIA A800", "a CPU", "NVIDIA A800", "NVIDIA A800"]) == (
        "4 processes are on devices of different kinds: 3 on NVIDIA A800 (rank 0…), 1 on a CPU (rank 1…); "
        "the nearest that works: the 3 on NVIDIA A800 alone"
    )


def test_settings_that_do_not_go_together() -> None:
    for keys, said in (
        ({"tensor": 2}, "tensor 2 needs parallel: fsdp, not none"),
        ({"parallel": "ddp", "context": 2}, "context 2 needs parallel: fsdp, not ddp"),
        ({"parallel": "fsdp", "tensor": 2, "compile": True}, "compile does not support tensor 2"),
        ({"parallel": "fsdp", "pipeline": 0}, "pipeline must be positive, not 0"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainConfig(steps=1, batch_size=1, learning_rate=1.0, **keys)  # type: ignore[arg-type]
