"""``python -m benchmarks gpu-check``: the first run on a machine with a GPU, in at most nine minutes.

Runs ``tests/gpu`` and measures what the design rests on. Parts are independent, each in a time box; one that
fails prints its error, and the others go on. Prints one JSON line a fact and writes them to
benchmarks/gpu.md.
``--tiny --device cpu`` shows that the script runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.gpu import parts
from benchmarks.gpu.parts import Bench
from xverse.files import atomic_file

PAGE = Path(__file__).parents[1] / "gpu.md"
MARK = "<!-- rows written by gpu-check -->"


def _both_ways(function: Callable[..., torch.Tensor], *inputs: Any) -> None:
    function(*inputs).sum().backward()


def environment(bench: Bench) -> None:
    cuda = bench.cuda
    bench.say(
        "environment",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if cuda else None,
        device=torch.cuda.get_device_name(bench.device) if cuda else "cpu",
        capability=torch.cuda.get_device_capability(bench.device) if cuda else None,
    )


def tests(bench: Bench) -> None:
    """``tests/gpu`` in a process of its own."""
    if not bench.cuda:
        bench.say("tests", result="skipped: no GPU")
        return
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    bench.say("tests", code=run.returncode, tail=run.stdout.strip().splitlines()[-12:])


def plans(bench: Bench) -> None:
    """The first call at a new length, with cuDNN and without: what ``model.attention.attention`` avoids."""
    heads, size = (4, 64) if bench.tiny else (32, 128)
    lengths = [33, 57] if bench.tiny else random.Random(0).sample(range(200, 4000), 10)
    for name, on in (("default", True), ("without cuDNN", False)):
        if bench.cuda:
            torch.backends.cuda.enable_cudnn_sdp(on)
        first: list[float] = []
        again: list[float] = []
        for length in lengths:
            shape = (1, heads, length, size)
            q = torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
            for seconds in (first, again):
                begun = bench.now()
                scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
                seconds.append(bench.now() - begun)
        medians = (round(1e3 * statistics.median(seconds), 2) for seconds in (first, again))
        bench.say(
            "attention at a new length",
            backends=name,
            **dict(zip(("first_ms", "again_ms"), medians, strict=True)),
        )
    if bench.cuda:
        torch.backends.cuda.enable_cudnn_sdp(True)


def head(bench: Bench) -> None:
    """Head and loss, forward and backward, by chunk."""
    from xverse.model.chunks import loss_chunk
    from xverse.model.loss import linear_cross_entropy

    tokens, hidden, vocabulary = (256, 64, 1000) if bench.tiny else (8192, 4096, 100_534)
    rows = torch.randn(tokens, hidden, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(torch.randn(vocabulary, hidden, device=bench.device) * 0.02)
    targets = torch.randint(0, vocabulary, (tokens,), device=bench.device)
    for chunk in (loss_chunk(vocabulary, bench.device.type), 512, 1024, 4096):

        def step(chunk: int = chunk) -> None:
            weight.grad = rows.grad = None
            linear_cross_entropy(rows, weight, targets, reduction="sum", chunk=chunk).backward()

        seconds = bench.timed(step, 3)
        flops = 6 * tokens * hidden * vocabulary
        bench.say(
            "head and loss", chunk=chunk, ms=1e3 * seconds, tflops=flops / seconds / 1e12, **bench.peak()
        )


def packed(bench: Bench) -> None:
    """Documents of a row in one call compared with one call each."""
    from xverse.model import Packed, attention

    heads, size, tokens = (2, 64, 256) if bench.tiny else (32, 128, 8192)
    for documents in (1, 8, 32):
        ids = torch.arange(documents).repeat_interleave(tokens // documents)[None]
        context = Packed(ids, bench.device)
        q = torch.randn(1, tokens, heads, size, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)
        q.requires_grad_()
        results = {}
        for name, available in (("one call", attention.has_varlen), ("loop", lambda *a: False)):
            with _replaced(attention, "has_varlen", available):
                results[name] = context.attend(0, q, q, q).detach()
                seconds = bench.timed(functools.partial(_both_ways, context.attend, 0, q, q, q), 5)
            bench.say("packed documents", documents=documents, how=name, ms=1e3 * seconds)
        difference = (results["one call"] - results["loop"]).float().abs().max()
        bench.say("packed documents", documents=documents, difference=float(difference))


def layers(bench: Bench) -> None:
    """Products with quantised weights compared with bfloat16, by tokens; bytes a second of the weight."""
    from xverse.bench.weights import _random_layer
    from xverse.kernels import ops

    outputs, inputs = (256, 128) if bench.tiny else (11_008, 4096)
    for bits in (16, 8, 4):
        layer: Any = None
        if bits < 16:
            layer = _random_layer(outputs, inputs, bits, 128).to(bench.device)
        weight = layer.dequantize(torch.bfloat16) if layer else torch.randn(
            outputs, inputs, device=bench.device, dtype=torch.bfloat16
        )  # fmt: skip
        for tokens in (1, 4, 16, 64, 512):
            x = torch.randn(tokens, inputs, device=bench.device, dtype=torch.bfloat16)
            with torch.no_grad():
                run = layer or (lambda x, weight=weight: linear(x, weight))
                seconds = bench.timed(functools.partial(run, x), 20)
                off = (run(x) - linear(x, weight)).float().norm() / linear(x, weight).float().norm()
            size = outputs * inputs * bits / 8
            bench.say(
                "a layer",
                bits=bits,
                tokens=tokens,
                us=1e6 * seconds,
                gb_s=size / seconds / 1e9,
                off=float(off),
            )
        if layer:
            x = torch.randn(1, 64 if bench.tiny else 4096, inputs, device=bench.device, dtype=torch.bfloat16)
            x.requires_grad_()
            q = functools.partial(ops.dequantized_linear, tiles=layer.tiles, outputs=outputs, bits=bits)
            for name, run in (("QLoRA", q), ("plain", functools.partial(linear, weight=weight))):
                bench.say(
                    "a layer, both ways",
                    bits=bits,
                    how=name,
                    ms=1e3 * bench.timed(functools.partial(_both_ways, run, x), 5),
                )


def cache(bench: Bench) -> None:
    """Attention of decoding sequences: Triton's kernel, ``varlen_attn``, and the gather, by cache."""
    from xverse.kernels.paged_attention import PagedLayer, quantize_rows

    heads, size = (4, 64) if bench.tiny else (32, 128)
    for batch, length in ((2, 64),) if bench.tiny else ((1, 2048), (64, 1024)):
        for kind, page in (("bf16", 32), ("bf16", 256), ("int8", 32)):
            blocks = batch * -(-length // page)
            data = torch.randn(2, blocks, heads, page, size, device=bench.device, dtype=torch.bfloat16)
            layer = PagedLayer(data[0], data[1])
            if kind == "int8":
                (keys, key_scales), (values, value_scales) = map(quantize_rows, data)
                layer = PagedLayer(keys, values, key_scales, value_scales)
            table = torch.randperm(blocks, device=bench.device).int().view(batch, -1)
            lengths = torch.full((batch,), length, dtype=torch.int32, device=bench.device)
            q = torch.randn(batch, heads, size, device=bench.device, dtype=torch.bfloat16)
            moved = 2 * batch * length * heads * (size + 4 if kind == "int8" else 2 * size)
            expected = layer._attend_torch(q, table, lengths)
            for how, attend in (("ours", layer.attend), ("gather", layer._attend_torch)):
                off = (attend(q, table, lengths) - expected).float().norm() / expected.float().norm()
                run = functools.partial(attend, q, table, lengths)
                seconds = bench.timed(run, 20)
                bench.say(
                    "paged attention", batch=batch, length=length, cache=kind, page=page, how=how,
                    us=1e6 * seconds, gb_s=moved / seconds / 1e9, off=float(off),
                )  # fmt: skip


def ring(bench: Bench) -> None:
    """The fused kernels of context parallelism against attention in float64."""
    from xverse.train.context import attention as fused

    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(2, 4, 192, 64, device=bench.device, dtype=dtype) for _ in range(3))
        whole = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
        (a, la), (b, lb) = fused(q[:, :, 96:], k[:, :, :96], v[:, :, :96], False), fused(
            q[:, :, 96:], k[:, :, 96:], v[:, :, 96:], True
        )  # fmt: skip
        both = torch.logaddexp(la.float(), lb.float())
        merged = a * (la - both).exp()[..., None] + b * (lb - both).exp()[..., None]
        bench.say("ring kernels", dtype=str(dtype), off=float((merged - whole[:, :, 96:]).abs().max()))


PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {  # in the order of worth; seconds
    "environment": (environment, 20),
    "layers": (layers, 40),
    "cache": (cache, 40),
    "head": (head, 30),
    "packed": (packed, 30),
    "engine": (parts.engine, 150),
    "train": (parts.train, 120),
    "plans": (plans, 30),
    "generate": (parts.generate, 60),
    "ring": (ring, 20),
    "tests": (tests, 180),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", default="cuda", help="where to run")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test this script")
    parser.add_argument("--seconds", type=int, default=540, help="stop after this time")


def run(args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(torch.device(args.device), args.tiny, args.seconds)
    unknown = sorted({*args.parts} - {*PARTS})
    if unknown:
        from xverse.config import UserError

        raise UserError(f"unknown part '{unknown[0]}'; one of {', '.join(PARTS)}")
    for name in args.parts or PARTS:
        function, seconds = PARTS[name]
        left = args.seconds - bench.elapsed()
        if left < 10:
            bench.say(name, skipped="no time left")
            continue
        begun = bench.elapsed()
        try:
            with _time_box(int(min(seconds, left))):
                function(bench)
        except Exception as error:  # a failing part must not cost the others' figures
            bench.say(name, failed=f"{type(error).__name__}: {error}"[:400])
        bench.say("done", of=name, seconds=bench.elapsed() - begun)
        bench.free()
    if bench.cuda and not args.tiny:
        _write(bench.facts)
    return {"facts": len(bench.facts), "failed": sum("failed" in fact for fact in bench.facts)}


def _write(facts: list[dict[str, Any]]) -> None:
    """Replace the rows of the result page."""
    before = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    rows = [
        f"| {fact['part']} | {', '.join(f'{key} {value}' for key, value in fact.items() if key != 'part')} |"
        for fact in facts
        if fact["part"] != "done"
    ]
    with atomic_file(PAGE) as path:
        table = "\n".join(["| measurement | result |", "|---|---|", *rows])
        path.write_text(f"{before}{MARK}\n\n{table}\n", encoding="utf-8")


@contextlib.contextmanager
def _time_box(seconds: int) -> Iterator[None]:
    def end(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(max(1, seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
