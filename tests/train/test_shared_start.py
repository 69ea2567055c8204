"""Two processes verify and read a checkpoint together, each its share, and agree on what they found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = """
import json
from pathlib import Path
from xverse.model import XverseForCausalLM
from xverse.config import UserError
from xverse.data.feed import PretrainFeed
from xverse.data.mixture import MixtureConfig
from xverse.model import XverseConfig
from xverse import files
from xverse.train import TrainConfig, checkpoint, fit
from xverse.train.materialise import initial_weights
from xverse.train.optimizer import make_optimizer
from xverse.train.parallel import distribute, world_of

out = Path({out!r})
config = TrainConfig(
    steps=4, batch_size=4, learning_rate=1e-3, dtype="float32", parallel="fsdp", preflight="off",
    checkpoint_every=2, communication_every=0,
)
shape = XverseConfig(**{shape!r})
feed = PretrainFeed({data!r}, MixtureConfig(), 48, seed=0)
found = {{}}
with world_of("fsdp") as world:
    model = XverseForCausalLM.empty(shape)
    weights = initial_weights(shape, 0)
    fit(model, feed.batch, config, out, world=world, weights=weights)
    fingerprint, read_header = files.fingerprint, checkpoint.read_header
    read, headers = [], []
    files.fingerprint = lambda path: (read.append(path.name), fingerprint(path))[1]
    checkpoint.read_header = lambda path: (headers.append(path.name), read_header(path))[1]
    path, state = checkpoint.kept(out).newest(world)
    found["verified"] = [path.name, *read]
    world.wait()
    if world.rank == 0:
        file = path / "shard-00002-model-00001-of-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    world.wait()
    path, state = checkpoint.kept(out).newest(world)
    found["after damage"] = path.name
    world.wait()
    replica = distribute(XverseForCausalLM.empty(shape), config, world, initial_weights(shape, 0))
    optimizer = make_optimizer(replica.model, config)
    checkpoint.load_checkpoint(path, state, replica.model, optimizer, world)
    found["headers"] = list(headers)
    world.wait()
    if world.rank == 0:
        (path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    world.wait()
    for name, call in (
        ("newest", lambda: checkpoint.kept(out).newest(world)),
        ("load", lambda: checkpoint.load_checkpoint(path, state, replica.model, optimizer, world)),
    ):
        try:
            call()
        except UserError as error:
            found[name] = str(error)
    (out / f"found-{{world.rank}}.json").write_text(json.dumps(found))
"""


def test_each_process_verifies_and_reads_its_share(
    torchrun: Callable[..., Any], tmp_path: Path, prepared: Path, tiny_shape: dict[str, int]
) -> None:
    out = tmp_path / "run"
    started = torchrun(2, script=PROGRAM.format(out=str(out), shape=tiny_shape, data=str(prepared)))
    said, _ = started.communicate()
    assert started.returncode == 0, said
    for rank in (0, 1):
        found = json.loads((out / f"found-{rank}.json").read_text())
        mine = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        assert found["verified"] == ["step-00000004", mine]
        assert found["after damage"] == "step-00000002"
        assert found["headers"] == [mine]
        step = out / "checkpoints" / "step-00000002"
        lost = "shard-00002-model-00001-of-00001.safetensors: No such file or directory"
        reason = f"{step}: this checkpoint cannot be read ({lost})"
        assert found["newest"] == f"{reason}, and no earlier one is intact; delete it to start again"
        assert found["load"] == reason
    assert (out / "checkpoints" / "damaged-step-00000004").is_dir()
    assert said.count("has another SHA-256 than was recorded); going back to step-00000002") == 1
