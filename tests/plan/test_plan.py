"""The planner: its judgement by published measurements, its arithmetic, its search, its command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.studies.plan import fit, leave_one_out, read_measurements
from xverse.cli import main
from xverse.model.config import SHAPES, named_shape
from xverse.plan.cost import FITTED, Constants, Software, _Model, predict
from xverse.plan.devices import DEVICES
from xverse.plan.layout import Architecture, Layout, problem
from xverse.plan.memory import memory
from xverse.plan.report import BASIS, settings
from xverse.plan.search import ROOM, search, task_of
from xverse.train.settings import TrainConfig, layout_of

SEVEN = Architecture.of(named_shape("7b"))
A800 = DEVICES["a800"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        code = main(["plan", *arguments])
    except SystemExit as stopped:  # the parser refuses values out of range
        code = stopped.code  # type: ignore[assignment]
    assert code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.thorough
def test_sources_that_the_fit_has_not_seen_are_foretold() -> None:
    known = read_measurements()
    unseen = leave_one_out(known)
    errors = [abs(error) for _, some in unseen.values() for error in some]
    assert len(errors) == len(known.measurements) >= 90
    assert len(unseen) >= 8
    assert len(dataclasses.fields(Constants)) <= 4
    assert statistics.median(errors) <= 0.08
    assert max(errors) <= 0.30  # rows with 2,048 to 8,192 tokens a GPU and step on 1,024 GPUs, and MPT-30B's
    numbers = [len(errors), len(unseen), math.ceil(100 * statistics.median(errors)), round(100 * max(errors))]
    assert [int(number) for number in re.findall(r"\b(90|8|6|28)\b", BASIS)][:2] == numbers[:2]
    assert f"within {numbers[2]} % (median) and at worst {numbers[3]} %" in BASIS


def test_the_constants_are_those_of_the_fit() -> None:
    known = read_measurements()
    found = fit(known, known.measurements)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(FITTED), rel=0.01)


@pytest.mark.parametrize("name", [name for name in SHAPES if not named_shape(name).num_experts])
def test_an_architecture_has_the_parameters_and_flops_of_its_shape(name: str) -> None:
    shape = named_shape(name)
    arch = Architecture.of(shape)
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    assert arch.parameters == shape.num_parameters() - norms
    linears = 6 * (arch.parameters - shape.vocab_size * shape.hidden_size)
    attention = 12 * shape.num_hidden_layers * shape.hidden_size * 512
    assert arch.flops_per_token(512)["full"] == linears + attention
    assert arch.flops_per_token(512)["causal"] == linears + attention / 2


def test_time_and_memory_move_as_they_must() -> None:
    layout = Layout(shard=1024)
    plain = predict(SEVEN, layout, A800, 8192)
    assert sum(plain.step.parts().values()) == pytest.approx(plain.step.seconds)
    assert all(seconds >= 0 for seconds in plain.step.parts().values())
    assert plain.mfu(A800, causal=True) < plain.mfu(A800) < 1
    assert plain.days(2.6e12) == pytest.approx(2.6e12 / (plain.tokens_per_second * 1024) / 86400)
    slow = dataclasses.replace(A800, network=A800.network / 8)
    assert predict(SEVEN, layout, slow, 8192).step.seconds > plain.step.seconds
    full = dataclasses.replace(layout, checkpointing="full")
    assert predict(SEVEN, full, A800, 8192).step.seconds > plain.step.seconds
    kept = {c: memory(SEVEN, dataclasses.replace(layout, checkpointing=c), 8192).activations for c in
            ("none", "selective", "full")}  # fmt: skip
    assert kept["none"] > kept["selective"] > kept["full"]
    half = memory(SEVEN, Layout(shard=512, tensor=2), 8192)
    assert half.activations == pytest.approx(memory(SEVEN, layout, 8192).activations / 2)
    two, eight = (Layout(shard=8, pipeline=4, virtual_stages=v, accumulate=8) for v in (2, 8))
    bubbles = [predict(SEVEN, one, A800, 8192).step.bubble for one in (two, eight)]
    assert bubbles[0] == pytest.approx(4 * bubbles[1])


def collective(name: str, size: float, members: int) -> float:
    model = _Model(SEVEN, Layout(shard=members), DEVICES["h100"], 8192, FITTED, Software())
    return getattr(model, name)(size, members, 1)


def test_rings_have_latency_by_rank_and_trees_by_doubling() -> None:
    """NCCL's model: 3.4 us a hop over NVLink and 14 us over the network, 8.4 us to begin."""
    assert collective("ring", 0, 8) == pytest.approx(8.4e-6 + 8 * 3.4e-6 - 3.4e-6)
    assert collective("ring", 0, 16384) == pytest.approx(8.4e-6 + (16384 - 2048) * 3.4e-6 + 2048 * 14e-6)
    assert collective("ring", 0, 16384) > 0.07
    assert collective("total", 0, 16384) == pytest.approx(8.4e-6 + 2 * (7 * 3.4e-6 + 11 * 14e-6))
    assert collective("total", 1e9, 64) == pytest.approx(collective("ring", 1e9, 64) * 2, rel=0.1)


@pytest.mark.thorough
def test_large_clusters_get_groups_that_share_weights() -> None:
    task = task_of(named_shape("7b"), "7b", DEVICES["h100"], 16384, None, None)
    best = search(task)[0].layout
    assert best.shard <= 256
    assert best.replicate >= 64


@pytest.mark.parametrize("length", [100, 2_000])
def test_short_rows_fill_a_micro_batch(length: int) -> None:
    task = task_of(named_shape("7b"), "7b", DEVICES["h100"], 64, length, None)
    assert search(task)[0].mfu(task.device) > 0.4, (
        "as with 8,192 tokens: only attention depends on the length"
    )


def test_muon_costs_its_iterations() -> None:
    """684 TFLOP a step at 7B on every GPU, and the momentum gathered in float32."""
    flat = Layout(shard=1024)
    plain, muon = (predict(SEVEN, flat, A800, 8192, software=Software(optimizer=name)).step
                   for name in ("adamw", "muon"))  # fmt: skip
    flops = 0.0
    for rows, columns in map(sorted, SEVEN.matrices):
        flops += 5 * (2 * rows * rows * columns + 2 * rows**3 + 2 * rows * rows * columns) * SEVEN.layers
    least = flops / A800.flops + 4 * SEVEN.layers * SEVEN.layer_parameters / (8 * A800.network)
    assert muon.optimizer - plain.optimizer > least > 1.0
    assert muon.matmul == plain.matmul


def test_sharded_states_are_exact() -> None:
    """Parameters, gradients and AdamW's moments in float32: 16 bytes a parameter, shared by all."""
    found = memory(SEVEN, Layout(shard=64), 2048)
    assert found.parameters + found.gradients + found.optimizer == pytest.approx(16 * SEVEN.parameters / 64)


def test_the_best_of_1024_a800_is_found_at_once_and_can_run() -> None:
    start = time.process_time()
    task = task_of(named_shape("7b"), "7b", A800, 1024, None, None)
    found = search(task)
    assert time.process_time() - start < 10
    best = found[0]
    assert best.layout.processes == 1024
    assert best.layout.sequences * 8192 == task.batch_tokens
    assert best.memory.total <= ROOM * A800.memory
    assert not problem(SEVEN, best.layout, 8192, 8)
    assert best.step.seconds <= min(other.step.seconds for other in found) * 1.02
    for one in found:  # the trainer's own check, which raises
        config = TrainConfig(steps=1, learning_rate=1.0, **settings(one))
        assert layout_of(config, 1024, named_shape("7b"), 8192).processes == 1024


def test_table_and_json_say_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert main(["plan", "--device", "h100", "--gpus", "16", "--chart", str(picture)]) == 0
    table = capsys.readouterr().out
    assert main(["plan", "--device", "h100", "--gpus", "16", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["layouts"][0]
    assert f"{100 * best['mfu_full']:.1f} % attention counted full" in table
    assert f"{best['days']:.1f} days" in table
    assert sum(v for k, v in best["seconds"].items() if k != "hidden communication") == pytest.approx(
        best["step_seconds"]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_shapes_and_layouts_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "grouped.yaml"
    keys = "vocab_size: 128256\nhidden_size: 4096\nintermediate_size: 14336\nnum_hidden_layers: 32\n"
    file.write_text(keys + "num_attention_heads: 32\nnum_key_value_heads: 8\n")
    config = tmp_path / "config.json"
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
              "hidden_size": 4096,
              "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "max_position_embeddings": 8192}  # fmt: skip
    config.write_text(json.dumps(values))
    common = ["--device", "h100", "--gpus", "64", "--seq", "8192", "--json"]
    given = ["--layout", "data=16,tensor=4,micro_batch=1"]
    results = []
    for shape, zero in ((file, 3), (config, 3), (config, 1), (config, 0)):
        assert main(["plan", "--shape", str(shape), *common, *given[:1], f"{given[1]},zero={zero}"]) == 0
        results.append(json.loads(capsys.readouterr().out)["layouts"][0])
    assert results[0] == results[1]
    memory_of = [result["memory"]["optimizer"] for result in results]
    assert memory_of[0] == pytest.approx(memory_of[2]) == pytest.approx(memory_of[3] / 16)
    assert results[2]["memory"]["parameters"] == pytest.approx(16 * results[1]["memory"]["parameters"])
    assert main(["plan", "--shape", str(config), *common[:-1], *given]) == 0
    output = capsys.readouterr().out
    assert "given: FSDP 16, tensor 4" in output
    assert "fitted to 90 published measurements" in output
    for layout, message in (
        ("data=16,tenser=4,zeto=1", "'tenser' (did you mean 'tensor'?), 'zeto'"),
        ("data=16", "16 × 1 = 16 GPUs, not the 64 of --gpus"),
        ("data=64,zero=2", "zero=2: 0 (DDP), 1"),
        ("tensor=three", "tensor=three: expected a positive integer"),
        ("data=64,checkpointing=some", "not one of none, selective, full"),
        ("tensor", "expected key=value"),
    ):
        assert message in refused(capsys, "--device", "h100", "--gpus", "64", "--layout", layout)
    file.write_text(keys + "heads: 3\nlayers: 2\n")
    assert "unknown keys 'heads'" in refused(capsys, "--shape", str(file), *common[:4])
    assert "no such file" in refused(capsys, "--shape", str(tmp_path / "no.json"), *common[:4])


def test_a_device_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "card.yaml"
    file.write_text("like: a800\nname: A800 PCIe\nlink: 32.0e+9\n")
    results = []
    for device in ("a800", str(file)):
        assert main(["plan", "--device", device, "--gpus", "8", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1]["device"]["name"] == "A800 PCIe"
    assert results[1]["layouts"][0]["step_seconds"] > results[0]["layouts"][0]["step_seconds"]
    assert main(["plan", "--device", "a800", "--gpus", "8", "--link-gbs", "32", "--json"]) == 0
    flag = json.loads(capsys.readouterr().out)
    assert flag["layouts"][0]["step_seconds"] == results[1]["layouts"][0]["step_seconds"]
    file.write_text("like: a800\nlinks: 3\n")
    assert "unknown key 'links'; did you mean 'link'?" in refused(
        capsys, "--device", str(file), "--gpus", "8"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "a80", "--gpus", "8"], "unknown device 'a80'; did you mean 'a800'?"),
        (["--shape", "7bb", "--device", "a800", "--gpus", "8"], "unknown shape '7bb'; did you mean '7b'?"),
        (["--device", "a800", "--gpus", "8", "--seq", "9000"], "9,000 tokens exceeds the 8,192 positions"),
        (
            ["--device", "a800", "--gpus", "1000", "--batch-tokens", "8388608"],
            "1,000 × A800 80 GB takes 1,024 sequences of 8,192 tokens a step: the batch does not divide "
            "among them; the nearest number of GPUs that works is 1,024",
        ),
        (
            ["--shape", "65b", "--device", "a800", "--gpus", "2"],
            "the nearest number of GPUs that works is 32",
        ),
        (["--device", "a800", "--gpus", "8", "--batch-tokens", "1000"], "the nearest is 8,192"),
        (["--device", "a800", "--gpus", "0"], "argument --gpus: 0 is out of range"),
        (["--device", "a800", "--gpus", "8", "--tflops", "-3"], "argument --tflops: '-3' is out of range"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


def test_it_starts_without_torch() -> None:
    code = "import sys; from xverse.cli import main; main(['plan', '--device', 'a100', '--gpus', '8']); "
    code += "assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "recommended:" in result.stdout
