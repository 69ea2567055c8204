"""Training a tokenizer: time and memory on text of any size, against the ``tokenizers`` library's trainer.

The library trains on a prefix of the same text, before and after ours, and the results must be equal. It then
trains on the largest prefix that fits into the memory that ours took for the whole text. Every training has
its own process, which reports its VmHWM. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.studies.common import ROOT, add_directory, existing, module, need_proc, run_xverse
from benchmarks.studies.made_text import make_text, prefix
from xverse import hardware
from xverse.bench.options import add_threads, positive
from xverse.bench.report import Row, at_least, at_most, show
from xverse.config import UserError
from xverse.log import notice
from xverse.tokenizer import Tokenizer, native

LIMIT_GB, SPEEDUP = 4.0, 2.0  # targets: peak memory at 10 GB of text; speed relative to the library at 500 MB
UNIQUE = 40_000_000  # target for the distinct words in 10 GB


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, metavar="DIR", help="text of many languages to imitate")
    parser.add_argument("--size-mb", type=positive, default=10_000, metavar="N", help="size of the text made")
    parser.add_argument(
        "--prefix-mb", type=positive, default=500, metavar="N", help="size of the prefix that both train on"
    )
    parser.add_argument(
        "--vocab-size", type=positive, default=100_534, metavar="N", help="entries of the tokenizer"
    )
    parser.add_argument(
        "--limit-alphabet", type=positive, default=12_000, metavar="N", help="single characters, at most"
    )
    parser.add_argument(
        "--memory-gb", type=float, default=3.0, metavar="GB", help="memory limit of our trainer"
    )
    parser.add_argument(
        "--peer-minutes", type=float, default=120.0, metavar="T", help="time for the library's largest prefix"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the text")
    add_threads(parser)
    add_directory(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    corpus: str | Path,
    size_mb: int = 10_000,
    prefix_mb: int = 500,
    vocab_size: int = 100_534,
    limit_alphabet: int = 12_000,
    memory_gb: float = 3.0,
    peer_minutes: float = 120.0,
    seed: int = 0,
    threads: int | None = None,
    directory: str | Path | None = None,
) -> dict[str, Any]:
    """Measure everything. ``corpus``: text to imitate; ``directory``: for generated text (None: temporary).

    Raises UserError for too little disk, a missing folder, or a system without /proc.
    """
    native.require()
    need_proc()
    prefix_mb = min(prefix_mb, size_mb)
    base = existing(directory)
    need = int(1.6e6 * size_mb + 4e6 * prefix_mb)
    if shutil.disk_usage(base).free < need:
        raise UserError(
            f"{base}: needs {need / 1e9:.1f} GB of disk, {shutil.disk_usage(base).free / 1e9:.1f} are free"
        )
    workers = threads or hardware.cores().usable
    with tempfile.TemporaryDirectory(prefix="xverse-tokenizer-", dir=base) as name:
        folder = Path(name)
        start = time.perf_counter()
        files = make_text(Path(corpus), folder / "text", size_mb * 10**6, seed)
        made_s = time.perf_counter() - start
        made = sum(path.stat().st_size for path in files)
        rate = f"{made / 1e6 / made_s:.0f} MB/s"
        notice(f"tokenizer: generated {made / 1e9:.2f} GB in {len(files)} languages, {rate}")
        common = ["--vocab-size", str(vocab_size), "--limit-alphabet", str(limit_alphabet)]
        common += ["--memory-gb", str(memory_gb), "--threads", str(workers)]
        whole = _ours(folder, "whole", folder / "text", common)
        notice(
            f"tokenizer: ours on all of it took {whole['seconds']:.1f} s, {whole['peak_bytes'] / 1e9:.2f} GB"
        )

        part = prefix(files, folder / "prefix", prefix_mb * 10**6)
        settings = folder / "settings.json"
        ours, peer = [_ours(folder, "first", folder / "prefix", common)], []
        settings.write_text(json.dumps(_alphabet(folder / "first", part, vocab_size)))
        peer.append(_peer(folder, folder / "prefix", settings, workers))
        peer.append(_peer(folder, folder / "prefix", settings, workers))
        ours.append(_ours(folder, "second", folder / "prefix", common))
        equal = len({result["hash"] for result in ours + peer}) == 1
        limit = max(whole["peak_bytes"], ours[0]["peak_bytes"])
        most = _largest_prefix(
            folder,
            files,
            settings,
            workers,
            limit,
            prefix_mb,
            size_mb,
            vocab_size,
            peer[0],
            60 * peer_minutes,
        )
    ratio = statistics.median(r["seconds"] for r in peer) / statistics.median(r["seconds"] for r in ours)
    result = {
        "bench": "tokenizer",
        "languages": len(files),
        "seed": seed,
        "vocab_size": vocab_size,
        "limit_alphabet": limit_alphabet,
        "threads": workers,
        "memory_gb": memory_gb,
        "text_bytes": made,
        "made_mb_s": round(made / 1e6 / made_s, 1),
        "whole": whole,
        "prefix_mb": prefix_mb,
        "prefix_ours": ours,
        "prefix_library": peer,
        "equal_merges": equal,
        "speedup": round(ratio, 3),
        "library_in_the_same_memory": most,
    }
    _show(result)
    return result


def _show(result: dict[str, Any]) -> None:
    whole, most = result["whole"], result["library_in_the_same_memory"]
    peak = whole["peak_bytes"] / 1e9
    speed = result["text_bytes"] / 1e6 / whole["seconds"]
    unique = f"target ≥ {UNIQUE:,} at 10 GB" if result["text_bytes"] > 9e9 else ""
    of_ours, of_library = (
        [f"{r['seconds']:.1f}" for r in result[key]] for key in ("prefix_ours", "prefix_library")
    )
    show(
        f"tokenizer: {result['vocab_size']:,} entries from {result['text_bytes'] / 1e9:.2f} GB in "
        f"{result['languages']} languages",
        [
            Row("text generated", f"{result['made_mb_s']:.0f} MB/s (seed {result['seed']})"),
            Row("distinct words", f"{whole['words']:,}", unique),
            Row("ours, all of it", f"{whole['seconds']:.1f} s ({speed:.1f} MB/s)"),
            Row("  peak memory", f"{peak:.2f} GB", at_most(LIMIT_GB, round(peak, 2), "GB")),
            Row(f"prefix of {result['prefix_mb']} MB: ours", f"{', '.join(of_ours)} s"),
            Row("  the library", f"{', '.join(of_library)} s"),
            Row(
                "  speed relative to it",
                f"{result['speedup']:.2f} ×",
                at_least(SPEEDUP, result["speedup"], "×"),
            ),
            Row("  same tokenizer", "yes" if result["equal_merges"] else "NO", "target: yes"),
            Row("the library in the same memory", most["summary"]),
        ],
    )


def _ours(folder: Path, name: str, texts: Path, common: list[str]) -> dict[str, Any]:
    out = folder / name
    figures = run_xverse(["tokenizer", "train", "--out", str(out), *common, str(texts)], capture=True)
    counted = [line for line in figures.pop("stderr").splitlines() if "distinct words" in line]
    tokenizer = Tokenizer.load(out)
    return {**figures, "hash": tokenizer.hash, "words": int(counted[-1].split()[0].replace(",", ""))}


def _alphabet(directory: Path, files: list[Path], vocab_size: int) -> dict[str, Any]:
    """Settings for the library: the single characters that ours chose, and the others in the texts."""
    values = Tokenizer.load(directory).values["model"]
    made = {"".join(pair) for pair in values["merges"]}
    alphabet = sorted(token for token in values["vocab"] if len(token) == 1 and token not in made)
    return {"vocab_size": vocab_size, "alphabet": alphabet, "others": _others(files, alphabet)}


def _peer(
    folder: Path, texts: Path, settings: Path, threads: int, limit: float = 0, seconds: float = 0
) -> Any:
    """Run the library; None if it exceeds ``limit`` bytes or ``seconds`` (0: no limit)."""
    figures = folder / "peer.json"
    figures.unlink(missing_ok=True)
    command = module("workers.library_trainer", str(figures), str(texts), str(settings))
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while process.poll() is None:
        time.sleep(0.2)
        over = limit and (hardware.process_memory("VmRSS", process.pid) or 0) > limit
        if over or (seconds and time.perf_counter() - start > seconds):
            process.kill()
            process.communicate()
            return None
    stderr = process.communicate()[1]
    if process.returncode:
        raise UserError(
            f"the library's trainer failed: {(stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    notice(f"tokenizer: the library on {texts.name} took {time.perf_counter() - start:.1f} s")
    return json.loads(figures.read_text())


def _largest_prefix(
    folder: Path,
    files: list[Path],
    settings: Path,
    threads: int,
    limit: float,
    known_mb: int,
    size_mb: int,
    vocab_size: int,
    known: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Double or halve the measured prefix until memory, text or time runs out."""
    best = {"prefix_mb": known_mb, **known} if known["peak_bytes"] <= limit else None
    size, why = known_mb, "the memory"
    deadline = time.perf_counter() + seconds
    while True:
        size = size * 2 if best else size // 2
        if size > size_mb or size < 1:
            why = "the text" if best else "nothing fits"
            break
        left = deadline - time.perf_counter()
        if left <= 0:
            why = "the time for it"
            break
        part = prefix(files, folder / f"prefix-{size}", size * 10**6)
        path = folder / "larger.json"
        known_settings = json.loads(settings.read_text())
        path.write_text(
            json.dumps(
                {
                    **known_settings,
                    "others": _others(part, known_settings["alphabet"]),
                    "vocab_size": vocab_size,
                }
            )
        )
        run = _peer(folder, part[0].parent, path, threads, limit, left)
        shutil.rmtree(part[0].parent)
        if run is None:
            if best is not None:
                why = "the memory" if time.perf_counter() < deadline else "the time for it"
                break
            continue
        going_up = best is not None
        best = {"prefix_mb": size, **run}
        if not going_up:
            break
    if best is None:
        return {
            "prefix_mb": None,
            "summary": f"no prefix down to {max(size, 1)} MB fits",
            "limit_bytes": limit,
        }
    summary = f"{best['prefix_mb']} MB in {best['seconds']:.1f} s, {best['peak_bytes'] / 1e9:.2f} GB"
    summary += f" (ended by {why})"
    return {**best, "limit_bytes": limit, "ended_by": why, "summary": summary}


def _others(files: list[Path], alphabet: list[str]) -> list[str]:
    seen: set[str] = set()
    for path in files:
        with path.open(encoding="utf-8") as stream:
            while text := stream.read(1 << 24):
                seen |= set(text)
    return sorted(seen - set(alphabet) - {" "})
