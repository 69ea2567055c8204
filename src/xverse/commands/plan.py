"""``xverse plan``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from xverse.values import flags, positive, refuse_unused, whole

if TYPE_CHECKING:
    from xverse.model.config import XverseConfig

_OF_SEARCH = {"top": 6}  # flags that --layout makes useless, with their defaults


def arguments(parser: argparse.ArgumentParser) -> None:
    add = flags(parser)
    text = "nano, mini, 7b, 13b, 13b-2, 65b, a model directory, its config.json, or YAML with the same keys"
    add("--shape", text, default="7b", metavar="S")
    text = "a100, a800, h100, h200, b200, or a YAML file that describes a device"
    add("--device", text, required=True, metavar="D")
    add("--gpus", "number of devices", type=whole(1, 10**7), required=True, metavar="N")
    text = "length of a sequence (default: the shape's context)"
    add("--seq", text, type=whole(1, 10**9), metavar="TOKENS")
    text = "tokens of one step (default: about 4 Mi, at least one sequence per GPU)"
    add("--batch-tokens", text, type=whole(1, 10**15), metavar="TOKENS")
    text = "tokens of the whole training, to compute its days (default: 2.6e12)"
    add("--tokens", text, type=positive(1e18), default=2.6e12, metavar="TOKENS")
    add("--top", "how many kinds of layouts to show", type=whole(1), metavar="N")
    text = (
        "predict this layout instead of searching: data (or shard and replicate), tensor, context, "
        "pipeline, virtual_stages, micro_batch, checkpointing, and zero=0, 1 or 3"
    )
    add("--layout", text, metavar="KEY=N,…")
    add("--optimizer", "the optimizer", choices=["adamw", "muon"], default="adamw")
    add("--json", "print one JSON object instead of the table", action="store_true")
    add("--chart", "write a chart of where the time goes to this file", type=Path, metavar="PNG")
    parser.set_defaults(**_OF_SEARCH)
    device = parser.add_argument_group("figures of the device that replace the known ones")
    add = flags(device)
    add("--tflops", "peak of dense bf16 in TFLOP/s", type=positive(1e9), metavar="N")
    add("--memory-gb", "memory in GB", type=positive(1e9), metavar="N")
    add("--memory-gbs", "memory bandwidth in GB/s", type=positive(1e9), metavar="N")
    text = "NVLink or PCIe bandwidth of one GPU, one direction, in GB/s"
    add("--link-gbs", text, type=positive(1e9), metavar="N")
    add("--network-gbits", "one GPU's share of the network in Gbit/s", type=positive(1e9), metavar="N")
    add("--gpus-per-machine", "number of GPUs in one machine", type=whole(1, 10**6), metavar="N")


def run(args: argparse.Namespace) -> int:
    import json

    from xverse.files import check_writable
    from xverse.plan.cost import predict
    from xverse.plan.devices import find_device
    from xverse.plan.report import chart, figures, text
    from xverse.plan.search import distinct, given_layout, search, software_of, task_of

    device = find_device(
        args.device,
        flops=_times(args.tflops, 1e12),
        memory=_times(args.memory_gb, 1e9),
        bandwidth=_times(args.memory_gbs, 1e9),
        link=_times(args.link_gbs, 1e9),
        network=_times(args.network_gbits, 1e9 / 8),
        gpus_per_machine=args.gpus_per_machine,
    )
    shape = _shape(args.shape)
    task = task_of(shape, args.shape, device, args.gpus, args.seq, args.batch_tokens)
    heading = "recommended"
    if args.chart:
        check_writable(args.chart.parent)
    if args.layout:
        refuse_unused(args, "a search, which --layout replaces", **_OF_SEARCH)
        layout, heading = given_layout(task, args.layout), "given"
        software = software_of(layout, args.optimizer)
        chosen = [predict(task.arch, layout, device, task.length, software=software)]
    else:
        chosen = distinct(search(task, args.optimizer), args.top)
    if args.chart:
        chart(args.chart, task, args.shape, chosen)
    if args.json:
        print(json.dumps(figures(task, args.shape, chosen, args.tokens)))
    else:
        print(text(task, args.shape, chosen, args.tokens, heading))
    return 0


def _shape(name: str) -> XverseConfig:
    """A shape by name, or that of a model's directory or config.json, or of a YAML file with its keys."""
    from xverse.config import UserError, build, read_yaml
    from xverse.model.config import SHAPES, XverseConfig, named_shape
    from xverse.texts import read_object

    path = Path(name).expanduser()
    if name not in SHAPES and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix in (".yaml", ".yml"):
        return build(XverseConfig, read_yaml(path), str(path))
    if path.suffix != ".json":
        if name not in SHAPES and path.is_dir():
            raise UserError(f"--shape {name}: no config.json in this folder")
        return named_shape(name)
    return XverseConfig.from_json(read_object(path), str(path))


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
