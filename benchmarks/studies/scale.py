"""The work of process 0 in a run of many processes, by simulation: of 1,024 processes, one is real.

Checkpoint plans, checkpoint headers, heartbeats and the order of data run the product's own code on the
inputs of all ranks, measured in CPU seconds, which other programs hardly affect. Collectives run in real gloo
contexts in threads of this process, measured in wall time.
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
from xverse.formats.parts import Index, read_header
from xverse.log import notice
from xverse.model import XverseForCausalLM, named_shape
from xverse.train.checkpoint import OwnPlan
from xverse.train.dryrun import fake_world
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
    shape: str = "7b", ranks: Sequence[int] = RANKS, threads: Sequence[int] = THREADS, gathered: int = 256
) -> dict[str, Any]:
    """CPU seconds and bytes of process 0 for every number of ``ranks``; seconds of a sum in ``threads`` gloo
    contexts. Torch's own planning and reading of headers, which ours replace, are measured up to
    ``gathered``."""
    result: dict[str, Any] = {"bench": "scale", "shape": shape, "ranks": {}, "gloo": {}}
    rows = []
    for count in ranks:
        notice(f"scale: {count} ranks")
        figures = {
            **own_plan(shape, count),
            **(checkpoint_plan(shape, count) if count <= gathered else {}),
            **checkpoint_headers(shape, count, theirs=count <= gathered),
            **digests(shape, count),
            **heartbeats(count),
            **data_order(count),
        }
        result["ranks"][count] = figures
        rows += [Row(f"{count:,} ranks: {key}", f"{value:,.4g}") for key, value in figures.items()]
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
    """The shards of a model and of AdamW's state that ``rank`` of ``count`` holds under FSDP, without memory.
    Inside the block this process acts as that rank."""
    with fake_world(count, rank) as world:
        model = XverseForCausalLM.empty(named_shape(shape))
        config = TrainConfig(steps=1, batch_size=count, learning_rate=1e-4, parallel="fsdp")
        distribute(model, config, world)
        tensors: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            for key in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
                tensors[f"{key}.{name}"] = parameter.detach()
            tensors[f"optimizer.step.{name}"] = torch.zeros(())
        yield tensors


def local_plan(shape: str, count: int) -> SavePlan:
    """Rank 0's plan from torch's planner."""
    with sharded_tensors(shape, count) as tensors:
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=True)
        return planner.create_local_plan()


def own_plan(shape: str, count: int) -> dict[str, float]:
    """Rank 0's planning in the product, which sends nothing."""
    with sharded_tensors(shape, count) as tensors:
        start = time.process_time()
        planner = OwnPlan(True)
        planner.set_up_planner(tensors, is_coordinator=True)
        planner.create_global_plan([planner.create_local_plan()])
        return {"own_plan_s": time.process_time() - start}


def plan_of(rank: int, first: SavePlan) -> SavePlan:
    """The plan of ``rank``, derived from rank 0's: it has other rows of each sharded tensor."""

    def moved(item: WriteItem) -> WriteItem:
        if item.index.offset is None or not len(item.index.offset):
            return item
        data = item.tensor_data
        assert data is not None
        rows, whole = data.chunk.sizes[0], data.size[0]
        start = min(rank * rows, whole)  # the last shards of FSDP may be short or empty
        offsets = torch.Size([start, *data.chunk.offsets[1:]])
        sizes = torch.Size([min(rows, whole - start), *data.chunk.sizes[1:]])
        chunk = dataclasses.replace(data.chunk, offsets=offsets, sizes=sizes)
        index = dataclasses.replace(item.index, offset=offsets)
        return dataclasses.replace(item, index=index, tensor_data=dataclasses.replace(data, chunk=chunk))

    return dataclasses.replace(first, items=[moved(item) for item in first.items])


def checkpoint_plan(shape: str, count: int) -> dict[str, float]:
    """torch.distributed.checkpoint's planning of one save, which the product avoids: process 0 gathers all
    plans, removes duplicate writes and sends each plan back."""
    first = local_plan(shape, count)
    sent = [pickle.dumps(plan_of(rank, first)) for rank in range(count)]
    start = time.process_time()
    plans = [pickle.loads(plan) for plan in sent]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    together, _ = planner.create_global_plan(plans)
    back = sum(len(pickle.dumps(plan)) for plan in together)
    seconds = time.process_time() - start
    kept = [item.index for plan in together for item in plan.items]
    assert len(set(kept)) == len(kept), "nothing is written twice"
    return {"plan_s": seconds, "plan_bytes_in": float(sum(map(len, sent))), "plan_bytes_out": float(back)}


def checkpoint_headers(shape: str, count: int, theirs: bool = False) -> dict[str, float]:
    """The start of loading a checkpoint of ``count`` files by as many processes: each reads the header of one
    file, receives those of the others and locates its own parts. ``theirs``: also torch's reader, with which
    each process reads all headers."""
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
        figures = {"header_s": time.process_time() - start}
        headers = [read_header(file) for file in files]
        start = time.process_time()
        index = Index([file.name for file in files], headers)
        parts = [index.parts(name, (count - 1,), (1,)) for name in names]
        figures["index_s"] = time.process_time() - start
        assert all([part.file for part in own] == [files[-1].name] for own in parts)
        figures["index_bytes"] = float(sum(map(len, headers)))
        if theirs:
            start = time.process_time()
            HuggingFaceStorageReader(folder).read_metadata()
            figures["torch_headers_s"] = time.process_time() - start
            figures["torch_headers_bytes"] = float(sum(file.stat().st_size for file in files))
    return figures


def digests(shape: str, count: int) -> dict[str, float]:
    """Bytes that each process verifies when it starts, and the seconds by the rate of SHA-256."""
    some = bytes(2**27)
    start = time.process_time()
    hashlib.sha256(some)
    rate = len(some) / (time.process_time() - start)
    share = 12 * named_shape(shape).num_parameters() / count  # parameters and two moments, float32
    return {"verified_bytes": share, "verify_s": share / rate}


def heartbeats(count: int) -> dict[str, float]:
    """What a hung process reads to find the slowest rank: one file per rank, once."""
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(count):
            dog = Watchdog(Path(folder), World(rank, count), 0)
            dog._folder.mkdir(exist_ok=True)
            dog.beat(7 if rank == count - 1 else 8, "step")
            dog._write("running")
        start = time.process_time()
        report = dog._behind()
        seconds = time.process_time() - start
    assert report == f"rank {count - 1} (step 8, step)", report
    return {"heartbeats_s": seconds}


def data_order(count: int, length: int = 8192) -> dict[str, float]:
    """Finding the last rank's row in a step's batch of ``count`` rows, without the other rows."""
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
    """Time and memory of the order of a source's documents: once per epoch, and once per block, of which two
    are kept."""
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
    """A shard of documents of 600 to 1,400 tokens, in which all tokens share one location in memory."""
    lengths = np.random.default_rng(0).integers(600, 1400, documents)
    offsets: Any = np.concatenate(([0], np.cumsum(lengths)))
    header = ShardHeader("made", "en", "text", "made", documents=documents, tokens=int(offsets[-1]))
    tokens: Any = np.broadcast_to(np.uint32(7), (int(offsets[-1]),))
    return Shard(Path(name), header, tokens, offsets)


def gloo(count: int, rounds: int = 20) -> dict[str, float]:
    """Median seconds of a sum of 4 numbers in ``count`` gloo contexts in threads, by ``World.sum`` and by
    gloo's allreduce, which it replaces."""
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
