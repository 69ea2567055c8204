"""``xverse eval``: benchmarks, their report, comparison, and where their data comes from."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from xverse.config import UserError

DEFAULT_TASKS = "mmlu,ceval,agieval,gaokao-bench,gaokao-english"


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="run|report|compare|fetch", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)

    run = add("run", "score a model; a run that was killed goes on when it is started again")
    run.add_argument("--model", default="nano", metavar="M", help="nano, a model directory or a hub id")
    run.add_argument(
        "--tasks",
        default=DEFAULT_TASKS,
        metavar="T,…",
        help="of these, and ppl, gsm8k, humaneval, skills (%(default)s)",
    )
    run.add_argument("--data-dir", metavar="D", help="folder with the benchmarks (default: what fetch got)")
    run.add_argument("--out", required=True, metavar="DIR", help="answers and report")
    run.add_argument("--shots", type=int, default=5, metavar="N", help="examples before each question (5)")
    run.add_argument("--limit", type=int, metavar="N", help="questions of each subject (default: all)")
    run.add_argument("--split", metavar="S", help="such as test or val (default: the benchmark's own)")
    run.add_argument("--quantize", choices=["int8", "int4"], help="make the weights smaller first")
    run.add_argument(
        "--backend",
        choices=["engine", "transformers"],
        help="default: the engine for XVERSE, transformers for Baichuan, ChatGLM2, Falcon, InternLM, Llama, "
        "MPT, Vicuna",
    )
    run.add_argument("--kv-dtype", choices=["auto", "int8"], default="auto", help="type of the cache")
    run.add_argument(
        "--fix-none",
        action="store_true",
        help='MMLU: the option "None", where the official text is nan',
    )
    run.add_argument("--skip-malformed", action="store_true", help="leave malformed rows out, and count them")
    run.add_argument("--texts", metavar="D", help="ppl: a folder with a file of text for each language")
    run.add_argument("--allow-code", action="store_true", help="humaneval: run what the model writes")
    run.add_argument("--shard", metavar="I/N", help="answer the I-th of N parts (from 0); report joins them")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads")

    report = add("report", "tables, plot and report.json of finished runs; several: at several precisions")
    report.add_argument("runs", nargs="+", metavar="DIR", help="folders of `eval run`")
    report.add_argument("--out", metavar="DIR", help="where to write (default: the first folder)")

    compare = add("compare", "two runs on the same questions, with the significance of their difference")
    compare.add_argument("first", metavar="DIR")
    compare.add_argument("second", metavar="DIR")

    fetch = add("fetch", "download the benchmarks' data, verified")
    fetch.add_argument("sets", nargs="*", metavar="SET", help="which (default: all)")
    fetch.add_argument("--data-dir", metavar="D", help="where to (default: the cache)")


def run(args: argparse.Namespace) -> int:
    return {"run": _run, "report": _report, "compare": _compare, "fetch": _fetch}[args.action](args)


def data_folder(given: str | None) -> Path:
    """Where benchmarks are: as named, or where ``fetch`` puts them."""
    if given is not None:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "xverse" / "eval"


def _run(args: argparse.Namespace) -> int:
    if not 0 <= args.shots <= 5:
        raise UserError(f"--shots: {args.shots} is out of range (0 to 5)")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit: {args.limit} is out of range (at least 1)")
    shard = _shard(args.shard)
    from xverse.config import choose
    from xverse.data.benchmarks.custom import is_description
    from xverse.data.benchmarks.questions import Options
    from xverse.eval import run as evaluation
    from xverse.eval.backends import EngineBackend, load_backend
    from xverse.eval.benchmarks import BENCHMARKS
    from xverse.eval.generation import Settings
    from xverse.eval.tasks import TASKS

    names = list(dict.fromkeys(name for name in args.tasks.split(",") if name))
    if not names:
        raise UserError("--tasks: names no task")
    for name in names:
        if not is_description(name):
            choose("task", name, {**BENCHMARKS, **TASKS})
    others = [name for name in names if name in TASKS]
    if "humaneval" in others and not args.allow_code:
        raise UserError("humaneval runs what the model writes; --allow-code says that it may")
    data_dir = data_folder(args.data_dir)
    plans = evaluation.plan(
        [name for name in names if name not in TASKS],
        data_dir,
        options=Options(split=args.split, fix_none=args.fix_none),
        limit=args.limit,
        skip_malformed=args.skip_malformed,
    )
    out = Path(args.out).expanduser()
    backend = load_backend(
        args.model,
        which=args.backend,
        quantize=args.quantize,
        threads=args.threads,
        kv_dtype=args.kv_dtype,
    )
    if others and not isinstance(backend, EngineBackend):
        raise UserError(f"{others[0]} is for XVERSE models: other models are scored on multiple choice alone")
    asked = {
        "model": args.model,
        "quantize": args.quantize,
        "kv_dtype": args.kv_dtype,
        "backend": type(backend).__name__,
        "dtype": backend.dtype,
        "shots": args.shots,
        "limit": args.limit,
        "fix_none": args.fix_none,
        "texts": args.texts,
    }
    facts = evaluation.to_folder(plans, backend, out, asked, shard=shard)
    if isinstance(backend, EngineBackend) and shard[0] == 0:
        texts = None if args.texts is None else Path(args.texts).expanduser()
        settings = Settings(limit=args.limit, allow_code=args.allow_code, texts=texts)
        evaluation.run_tasks(others, backend, data_dir, out, settings)
    if shard == (0, 1):
        from xverse.eval import report

        report.write(out, [report.read(out)])
        _print(out)
    else:
        print(
            f"shard {args.shard}: {facts['questions']} questions in {facts['seconds']:.0f} s", file=sys.stderr
        )
    return 0


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    number, slash, count = text.partition("/")
    if not slash or not number.isdigit() or not count.isdigit() or int(number) >= int(count):
        raise UserError(f"--shard: '{text}' is no I/N with I from 0 to N - 1")
    return int(number), int(count)


def _report(args: argparse.Namespace) -> int:
    from xverse.eval import report

    out = Path(args.out or args.runs[0]).expanduser()
    report.write(out, [report.read(Path(run).expanduser()) for run in args.runs])
    _print(out)
    return 0


def _print(out: Path) -> None:
    print((out / "report.md").read_text(encoding="utf-8"), end="")
    print(f"{out / 'report.md'}", file=sys.stderr)


def _compare(args: argparse.Namespace) -> int:
    from xverse.eval import compare

    for line in compare.lines(Path(args.first).expanduser(), Path(args.second).expanduser()):
        print(line)
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from xverse.eval import fetch

    for line in fetch.fetch(args.sets, data_folder(args.data_dir)):
        print(line, file=sys.stderr)
    return 0
