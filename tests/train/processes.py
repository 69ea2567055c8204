"""Trains a tiny model under one layout after another in the same processes: ``python processes.py JOBS.json``.

Starting processes and importing torch is what costs; so one parent imports and forks, and its children rebuild
their device meshes for every job. A job has ``out``, ``train`` (keys of TrainConfig) and, in ``stop``, the step
after which it is to end as if it had been killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xverse.config import UserError
from xverse.data.feed import Batch
from xverse.model import IGNORE, XverseConfig, XverseForCausalLM, init_weights
from xverse.train import TrainConfig, fit
from xverse.train.loop import sum_loss
from xverse.train.parallel import ALONE, Replica, World, whole, world_of

LENGTH = 32
SHAPE = XverseConfig(
    vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    initializer_range=0.1,
)  # fmt: skip
BASE: dict[str, Any] = {
    "steps": 20, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 5, "dtype": "float32",
    "z_loss": 1e-3, "checkpoint_every": 10, "keep_checkpoints": 9, "validate_every": 10,
}  # fmt: skip


class Stop(Exception):
    """A job has come to where it is to end."""


def batch(step: int, start: int, stop: int) -> Batch:
    """Rows of random tokens; most hold several documents, and each document's first half has no targets."""
    rows = []
    for row in range(start, stop):
        generator = torch.Generator().manual_seed(1000 * step + row)
        tokens = torch.randint(4, SHAPE.vocab_size, (LENGTH + 1,), generator=generator)
        cuts = torch.rand(LENGTH, generator=generator) < (0.0 if row % 4 == 0 else 0.15)
        ids = cuts.cumsum(0).int()
        targets = tokens[1:].clone()
        targets[:-1][ids[1:] != ids[:-1]] = IGNORE
        targets[torch.rand(LENGTH, generator=generator) < 0.05 * (row % 3)] = IGNORE
        rows.append((tokens[:-1], targets, ids))
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def train(job: dict[str, Any], world: World = ALONE) -> None:
    """Run a job, and write the whole model that came out to ``OUT/model.safetensors``."""
    config = TrainConfig(**{**BASE, **job["train"]})
    model = XverseForCausalLM(SHAPE)
    init_weights(model, seed=0)

    def batch_at(step: int, start: int, stop: int) -> Batch:
        if step == job.get("stop"):
            raise Stop
        return batch(step, start, stop)

    def validate(replica: Replica) -> dict[str, float]:
        held_out = batch(9999, 0, 3)
        total = sum_loss(replica, held_out.tokens, held_out.targets, held_out.document_ids, config.dtype)
        return {"loss": total.item()}

    out = Path(job["out"])
    try:
        fit(model, batch_at, config, out, validate=validate, world=world)
    except Stop:
        return
    except UserError as error:
        (out.parent / f"{out.name}.{world.rank}.error").write_text(str(error))
        return
    tensors = {name: tensor.detach() for name, tensor in whole(model, world).state_dict().items()}
    if world.rank == 0:
        save_file(tensors, out / "model.safetensors")
    world.wait()


def child(rank: int, jobs: list[dict[str, Any]], environment: dict[str, str]) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    with world_of("fsdp") as world:
        for job in jobs:
            train(job, world)


def main(jobs: list[dict[str, Any]], processes: int) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    forked = multiprocessing.get_context("fork")
    children = [forked.Process(target=child, args=(n, jobs, environment)) for n in range(processes)]
    for each in children:
        each.start()
    for each in children:
        each.join()
    return max(abs(each.exitcode or 0) for each in children)


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    sys.exit(main(given["jobs"], given["processes"]))
