"""What a run of many processes costs its process 0, by simulation: a world of 1,024 of which one is real.

Checkpoint plans, checkpoint headers, heartbeats and the order of data are the product's own code over as many
ranks' inputs as asked for, in seconds of processor time, which other programs hardly change. Collectives are
measured between real gloo contexts, in threads of this process, by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from xverse.bench.options import add_shape, positive
from xverse.bench.report import Row, show
from xverse.data.mixture import Mixture
from xverse.data.packing import StreamPacker
from xverse.data.shards import Shard, ShardHeader
from xverse.log import notice
from xverse.model import named_shape
from xverse.train.checkpoint import _OwnPlan
from xverse.train.dryrun import fake_world
from xverse.train.index import Index, read_header
from xverse.train.materialise import empty_model
from xverse.train.parallel import World, add_up, distribute
from xverse.train.settings import TrainConfig
from xverse.train.survival import Watchdog

RANKS = (16, 64, 256, 1024)
THREADS = (4, 8, 16, 32)
DOCUMENTS = (2_000_000, 20_000_000)


def arguments(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, "7b")
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=RANKS, metavar="N", help="sizes of simulated worlds"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        nargs="+",
        default=THREADS,
        metavar="N",
        help="numbers of real gloo contexts",
    )
    parser.add_argument(
        "--gathered", type=positive, default=256, metavar="N", help="largest world for torch's own methods"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    shape: str = "7b",
    ranks: Sequence[int] = RANKS,
    threads: Sequence[int] = THREADS,
    gathered: int = 256,
) -> dict[str, Any]:
    """Processor seconds and bytes of process 0 for every number of ``ranks``; seconds of a sum among
    ``threads`` gloo contexts. Torch's own planning and reading of headers, which ours replace, are measured
    up to ``gathered``."""
    result: dict[str, Any] = {"bench": "scale", "shape": shape, "ranks": {}, "gloo": {}}
    rows = []
    for count in ranks:
        notice(f"scale: {count} ranks")
        found = {
            **own_plan(shape, count),
            **(checkpoint_plan(shape, count) if count <= gathered else {}),
            **checkpoint_headers(shape, count, theirs=count <= gathered),
            **digests(shape, count),
            **heartbeats(count),
            **data_order(count),
        }
        result["ranks"][count] = found
        rows += [Row(f"{count:,} ranks: {key}", f"{value:,.4g}") for key, value in found.items()]
    for count in threads:
        result["gloo"][count] = gloo(count)
        rows += [
            Row(f"gloo, {count} contexts: a sum of 4 numbers, {name}", f"{1e6 * seconds:,.0f} µs")
            for name, seconds in result["gloo"][count].items()
        ]
    result["documents"] = [document_order(count) for count in DOCUMENTS]
    rows += [
        Row(f"order of {each['documents']:,} documents", json.dumps(each)) for each in result["documents"]
    ]
    show("scale: process 0's work", rows)
    return result


@contextlib.contextmanager
def sharded_tensors(shape: str, count: int, rank: int = 0) -> Iterator[dict[str, Any]]:
    """What ``rank`` of ``count`` holds of a model and AdamW's states under FSDP, without memory; inside the
    block this process is that rank."""
    with fake_world(count, rank) as world:
        model = empty_model(named_shape(shape))
        config = TrainConfig(steps=1, batch_size=count, learning_rate=1e-4, parallel="fsdp")
        distribute(model, config, world)
        tensors: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            for key in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
                tensors[f"{key}.{name}"] = parameter.detach()
            tensors[f"optimizer.step.{name}"] = torch.zeros(())
        yield tensors


def local_plan(shape: str, count: int) -> SavePlan:
    """Rank 0's, as torch's planner makes it."""
    with sharded_tensors(shape, count) as tensors:
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=True)
        return planner.create_local_plan()


def own_plan(shape: str, count: int) -> dict[str, float]:
    """Rank 0's planning as the product does it: nothing is sent."""
    with sharded_tensors(shape, count) as tensors:
        start = time.process_time()
        planner = _OwnPlan(True)
        planner.set_up_planner(tensors, is_coordinator=True)
        planner.create_global_plan([planner.create_local_plan()])
        return {"own_plan_s": time.process_time() - start}


def plan_of(rank: int, first: SavePlan) -> SavePlan:
    """Rank ``rank``'s plan as it differs from rank 0's: other rows of each sharded tensor."""

    def moved(item: WriteItem) -> WriteItem:
        if item.index.offset is None or not len(item.index.offset):
            return item
        data = item.tensor_data
        assert data is not None
        rows, whole = data.chunk.sizes[0], data.size[0]
        start = min(rank * rows, whole)  # FSDP's shares: the last ones may be short or empty
        offsets = torch.Size([start, *data.chunk.offsets[1:]])
        sizes = torch.Size([min(rows, whole - start), *data.chunk.sizes[1:]])
        chunk = dataclasses.replace(data.chunk, offsets=offsets, sizes=sizes)
        index = dataclasses.replace(item.index, offset=offsets)
        return dataclasses.replace(item, index=index, tensor_data=dataclasses.replace(data, chunk=chunk))

    return dataclasses.replace(first, items=[moved(item) for item in first.items])


def checkpoint_plan(shape: str, count: int) -> dict[str, float]:
    """torch.distributed.checkpoint's planning of one save: process 0 is sent every rank's plan, removes what
    several would write, and sends each its own back. The product does without."""
    first = local_plan(shape, count)
    sent = [pickle.dumps(plan_of(rank, first)) for rank in range(count)]
    start = time.process_time()
    plans = [pickle.loads(each) for each in sent]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    together, _ = planner.create_global_plan(plans)
    back = sum(len(pickle.dumps(plan)) for plan in together)
    seconds = time.process_time() - start
    kept = [item.index for plan in together for item in plan.items]
    assert len(set(kept)) == len(kept), "nothing is written twice"
    return {"plan_s": seconds, "plan_bytes_in": float(sum(map(len, sent))), "plan_bytes_out": float(back)}


def checkpoint_headers(shape: str, count: int, theirs: bool = False) -> dict[str, float]:
    """What loading a checkpoint of ``count`` files begins with, in each of as many processes: the header of
    one file, what all tell each other of theirs, and where this one's parts lie. ``theirs``: torch's reader
    too, with which each process reads all headers."""
    names = [item.index.fqn for item in local_plan(shape, 2).items]
    with tempfile.TemporaryDirectory() as folder:
        header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in
                  enumerate(names)}  # fmt: skip
        for rank in range(count):
            custom = {name: {"saved_offsets": [rank]} for name in names}
            metadata = {"DCP_SHARDING_INFO": json.dumps(custom), "DCP_VERSION": "1.0", "format": "pt"}
            text = json.dumps({"__metadata__": metadata, **header}).encode()
            data = len(text).to_bytes(8, "little") + text + bytes(4 * len(names))
            (Path(folder) / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors").write_bytes(data)
        files = sorted(Path(folder).iterdir())
        start = time.process_time()
        read_header(files[-1])
        found = {"header_s": time.process_time() - start}
        told = [read_header(file) for file in files]
        start = time.process_time()
        index = Index([file.name for file in files], told)
        parts = [index.parts(name, (count - 1,), (1,)) for name in names]
        found["index_s"] = time.process_time() - start
        assert all([part.file for part in each] == [files[-1].name] for each in parts)
        found["index_bytes"] = float(sum(map(len, told)))
        if theirs:
            start = time.process_time()
            HuggingFaceStorageReader(folder).read_metadata()
            found["torch_headers_s"] = time.process_time() - start
            found["torch_headers_bytes"] = float(sum(file.stat().st_size for file in files))
    return found


def digests(shape: str, count: int) -> dict[str, float]:
    """Bytes of a checkpoint that each process verifies at a start, and the seconds by the rate of SHA-256."""
    some = bytes(2**27)
    start = time.process_time()
    hashlib.sha256(some)
    rate = len(some) / (time.process_time() - start)
    share = 12 * named_shape(shape).num_parameters() / count  # parameters and two moments, float32
    return {"verified_bytes": share, "verify_s": share / rate}


def heartbeats(count: int) -> dict[str, float]:
    """What a hung process reads to say who is furthest behind: one file of each rank, once."""
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(count):
            dog = Watchdog(Path(folder), World(rank, count), 0)
            dog._folder.mkdir(exist_ok=True)
            dog.beat(7 if rank == count - 1 else 8, "step")
            dog._write("running")
        start = time.process_time()
        said = dog._behind()
        seconds = time.process_time() - start
    assert said == f"rank {count - 1} (step 8, step)", said
    return {"heartbeats_s": seconds}


def data_order(count: int, length: int = 8192) -> dict[str, float]:
    """The last rank's row of a step's batch of ``count`` rows: found without those of the others."""
    shards = {f"source{i}": made_shard(f"source{i}", 2000) for i in range(42)}
    packers = {name: StreamPacker(shard, length, 0) for name, shard in shards.items()}
    mixture = Mixture(dict.fromkeys(shards, 1.0), dict.fromkeys(shards, 1000), 0)
    step, times = 1000, []
    for number in range(step, step + 5):
        start = time.process_time()
        source, k = mixture.locate(number * count + count - 1)
        packers[source].sequence(k)
        times.append(time.process_time() - start)
    return {"row_s": min(times)}


def document_order(count: int) -> dict[str, float]:
    """What a process computes and holds of the order of a source's documents: once an epoch, and once a block
    of it, of which two are kept."""
    packer = StreamPacker(made_shard("documents", count), 8192, 0)
    start = time.process_time()
    runs, ends = packer._epoch(0)
    middle = time.process_time()
    block = packer._block(0, packer.blocks // 2)
    stop = time.process_time()
    held = runs.nbytes + ends.nbytes + 2 * (block.order.nbytes + block.ends.nbytes)
    return {
        "documents": count,
        "blocks": packer.blocks,
        "epoch_s": middle - start,
        "block_s": stop - middle,
        "bytes": held,
    }


def made_shard(name: str, documents: int) -> Shard:
    """A shard in memory, of documents of 600 to 1,400 tokens that all lie on the same few."""
    lengths = np.random.default_rng(0).integers(600, 1400, documents)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    header = ShardHeader("made", "en", "text", "made", documents=documents, tokens=int(offsets[-1]))
    tokens = np.broadcast_to(np.uint32(7), (int(offsets[-1]),))
    return Shard(Path(name), header, tokens, offsets)


def gloo(count: int, rounds: int = 20) -> dict[str, float]:
    """Median seconds of a sum of 4 numbers among so many gloo contexts in threads: ``World.sum``'s, and
    gloo's own, which it replaces."""
    with tempfile.TemporaryDirectory() as folder:
        times: dict[str, list[float]] = {"doubling": [], "ring": []}
        barrier = threading.Barrier(count)

        def work(rank: int) -> None:
            store = dist.FileStore(f"{folder}/store", count)
            group = dist.ProcessGroupGloo(store, rank, count, datetime.timedelta(seconds=60))
            for _ in range(rounds):
                for name in times:
                    barrier.wait()
                    start = time.perf_counter()
                    total = torch.tensor([1.0, rank, 0.0, 0.0], dtype=torch.float64)
                    if name == "ring":
                        group.allreduce([total]).wait()  # type: ignore[attr-defined]
                    else:
                        add_up(total, rank, count, group)
                    assert total.tolist() == [count, count * (count - 1) / 2, 0.0, 0.0]
                    if rank == 0:
                        times[name].append(time.perf_counter() - start)
            barrier.wait()

        _in_threads(count, work)
    return {name: float(np.median(some)) for name, some in times.items()}


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    problems: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
