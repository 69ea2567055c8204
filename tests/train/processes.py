"""Trains a tiny model under one layout after another in the same processes: ``processes.py PHASES.json``.

Starting processes and importing torch is what costs: one parent imports and forks, and its children make new
device meshes for every job of a phase. A phase has the number of ``processes`` and ``jobs``; a job has
``out``, ``train`` (keys of TrainConfig), perhaps ``shape``, a key of ``SHAPES``, ``stop``, the step before
which it is to end as if killed, or ``load``, checkpoints to read under its layout.
``python -m benchmarks composition`` uses the same models and rows.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from xverse.config import UserError
from xverse.data.feed import Batch
from xverse.model import IGNORE, XverseConfig, XverseForCausalLM, init_weights
from xverse.train import Hooks, TrainConfig, fit
from xverse.train.checkpoint import _tensors, load_checkpoint
from xverse.train.materialise import initial_weights
from xverse.train.optimizer import make_optimizer
from xverse.train.parallel import ALONE, Replica, World, distribute, whole, world_of
from xverse.train.validate import bits_per_byte

LENGTH = 32
SHAPE = XverseConfig(
    vocab_size=509,  # of which no number of processes is a divisor
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    initializer_range=0.1,
)
# What XVERSE's relatives have: shared key heads of another size, biases, normed heads, a tied head.
FAMILY = dataclasses.replace(
    SHAPE,
    model_type="llama",
    num_key_value_heads=2,
    head_dim=16,
    attention_bias=True,
    output_bias=True,
    qk_norm=True,
    norm_in_float32=False,
)
SHAPES = {"xverse": SHAPE, "family": FAMILY, "tied": dataclasses.replace(FAMILY, tie_word_embeddings=True)}
BASE: dict[str, Any] = {
    "steps": 10,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "dtype": "float32",
    "grad_clip": 0.5,  # below every step's
    "z_loss": 1e-3,
    "checkpoint_every": 5,
    "keep_checkpoints": 9,
    "validate_every": 5,
    "preflight": "off",  # it takes longer than a run
}


class Stop(Exception):
    """A job has come to where it is to end."""


def batch(first: int, stop: int) -> Batch:
    """Rows of random tokens; three in four hold several documents, and some tokens have no target."""
    rows = []
    for row in range(first, stop):
        generator = torch.Generator().manual_seed(row)
        tokens = torch.randint(4, SHAPE.vocab_size, (LENGTH + 1,), generator=generator)
        cuts = torch.rand(LENGTH, generator=generator) < (0.15 if row % 4 else 0.0)
        ids = cuts.cumsum(0).int()
        targets = tokens[1:].clone()
        targets[:-1][ids[1:] != ids[:-1]] = IGNORE
        targets[torch.rand(LENGTH, generator=generator) < 0.05 * (row % 3)] = IGNORE
        rows.append((tokens[:-1], targets, ids))
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


class HeldOut:
    """What ``bits_per_byte`` takes of a feed: two sources, of three batches and of one, so that two and four
    processes share them unequally."""

    valid_names = ("long", "short")

    def valid_batches(self, name: str, rows: int, max_tokens: None) -> Iterator[tuple[Batch, int]]:
        first = {"long": 10_000_000, "short": 20_000_000}[name]
        for start in range(first, first + (9 if name == "long" else 3), rows):
            yield batch(start, start + rows), 100


def tiny_model(shape: XverseConfig = SHAPE) -> XverseForCausalLM:
    model = XverseForCausalLM(shape)
    init_weights(model, seed=0)
    return model


def finish_checkpoint() -> None:
    """Wait for the checkpoint that a thread is writing."""
    for thread in threading.enumerate():
        if "_finish" in thread.name:
            thread.join()


def train(job: dict[str, Any], world: World = ALONE) -> None:
    """Run a job, and write the whole model that came out to ``OUT/model.safetensors``."""
    config = TrainConfig(**{**BASE, **job["train"]})
    alone, shape = world.size == 1, SHAPES[job.get("shape", "xverse")]
    model = tiny_model(shape) if alone else XverseForCausalLM.empty(shape)

    def batch_at(first: int, stop: int) -> Batch:
        if "stop" in job and first >= config.sequences(job["stop"]):
            raise Stop
        return batch(first, stop)

    def validate(replica: Replica) -> dict[str, float]:
        held_out: Any = HeldOut()
        figures = bits_per_byte(replica, held_out, batch_size=3, max_tokens=None, dtype=config.dtype)
        return {"loss": figures.pop("all"), **figures}

    out = Path(job["out"])
    try:
        weights = None if alone else initial_weights(shape, seed=0)
        fit(model, batch_at, config, out, hooks=Hooks(validate=validate), world=world, weights=weights)
    except UserError as error:
        (out.parent / f"{out.name}.{world.rank}.error").write_text(str(error))
        return
    except Stop:
        finish_checkpoint()
        return
    tensors = {name: tensor.detach().clone() for name, tensor in whole(model, world).state_dict().items()}
    if world.rank == 0:
        save_file(tensors, out / "model.safetensors")
    world.wait()


def load(job: dict[str, Any], world: World) -> None:
    """Begin under a layout, and read checkpoints: every process must get its part of what one process has,
    exactly."""
    config = TrainConfig(**{**BASE, **job["train"]})
    replica = distribute(XverseForCausalLM.empty(SHAPE), config, world, initial_weights(SHAPE, seed=0))
    initial = tiny_model().state_dict()
    for name, parameter in replica.model.named_parameters():
        same_part(parameter.detach(), initial[name], name)
    optimizer = make_optimizer(replica.model, config)
    for path in map(Path, job["load"]):
        expected = read_alone(path)
        state = json.loads((path / "state.json").read_text())
        load_checkpoint(path, state, replica.model, optimizer, world)
        found = dict(_tensors(replica.model, optimizer))
        assert len(found) == 4 * len(dict(replica.model.named_parameters()))
        for name, tensor in found.items():
            same_part(tensor, expected[name], (job["train"], path, name))


def same_part(tensor: torch.Tensor, whole: torch.Tensor, what: Any) -> None:
    """Assert that what this process has of a tensor is that of ``whole``, bit for bit."""
    if isinstance(tensor, DTensor):
        box = tensor.shape, tensor.device_mesh, tensor.placements
        shape, offset = compute_local_shape_and_global_offset(*box)
        whole = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        tensor = tensor.to_local()
    assert torch.equal(tensor, whole), what


def read_alone(path: Path, known: dict[Path, dict[str, torch.Tensor]] = {}) -> dict[str, torch.Tensor]:  # noqa: B006
    if path not in known:
        model = tiny_model()
        optimizer = make_optimizer(model, TrainConfig(**BASE))
        load_checkpoint(path, json.loads((path / "state.json").read_text()), model, optimizer)
        known[path] = {name: tensor.clone() for name, tensor in _tensors(model, optimizer)}
    return known[path]


def child(rank: int, phase: dict[str, Any], port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(phase["processes"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with world_of("fsdp") as world:
        for job in phase["jobs"]:
            (load if "load" in job else train)(job, world)


def run_phase(phase: dict[str, Any]) -> bool:
    """Whether all processes of a phase succeed. If one fails, the others, which wait for it, are ended."""
    with socket.socket() as free:  # chosen now: another test may take a port that was free minutes ago
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    children = [forked.Process(target=child, args=(rank, phase, port)) for rank in range(phase["processes"])]
    for process in children:
        process.start()
    running = list(children)
    while running and not any(process.exitcode for process in children):
        multiprocessing.connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
    for process in running:
        process.terminate()
    for process in children:
        process.join()
    return all(process.exitcode == 0 for process in children)


def main(phases: list[dict[str, Any]]) -> int:
    return 0 if all(map(run_phase, phases)) else 1


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
