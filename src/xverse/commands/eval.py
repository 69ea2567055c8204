"""``xverse eval``: running benchmarks, reporting and comparing runs, and fetching the data."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from xverse.config import UserError
from xverse.device import add_device, add_tensor_parallel
from xverse.values import add_actions, add_model, flags, positive, refuse_unused, whole

DEFAULT_TASKS = "mmlu,ceval,agieval,gaokao-bench,gaokao-english"
# Flags of eval run that only multiple-choice benchmarks use, with their defaults.
_OF_CHOICES = {"shots": 5, "split": None, "fix_none": False, "skip_malformed": False}


def arguments(parser: argparse.ArgumentParser) -> None:
    run, report, compare, fetch = add_actions(
        parser,
        run="score a model; started again, a killed run resumes",
        report="write tables, plot and report.json of one or several runs, such as several precisions",
        compare="compare two runs on the same questions, with the significance of the difference",
        fetch="download and verify the benchmarks' data",
    )
    add = flags(run)
    add_model(run)
    text = "tasks, also ppl, gsm8k, humaneval, skills and custom benchmarks (.yaml) (default: %(default)s)"
    add("--tasks", text, default=DEFAULT_TASKS, metavar="T,…")
    add("--data-dir", "data directory with the benchmarks (default: where fetch puts them)", metavar="D")
    add("--out", "folder for answers and report", required=True, metavar="DIR")
    text = "examples before each question, 0 to 5 (default: %(default)s)"
    add("--shots", text, type=whole(0, 5), metavar="N")
    add("--limit", "answer only the first N questions of each subject", type=whole(1), metavar="N")
    text = (
        "answer a random sample of each multiple-choice benchmark, with a standard error of POINTS "
        "(default: 1.5)"
    )
    add("--adaptive", text, type=positive(25), nargs="?", const=1.5, metavar="POINTS")
    add("--split", "split to answer, such as test or val (default: the benchmark's usual one)", metavar="S")
    add("--quantize", "quantise the weights first", choices=["int8", "int4"])
    text = (
        "what runs the model (default: the engine for XVERSE and the families that it runs, "
        "transformers for every other causal language model)"
    )
    add("--backend", text, choices=["engine", "transformers"])
    text = "type of the engine's KV cache (default: %(default)s)"
    add("--kv-dtype", text, choices=["auto", "int8"], default="auto")
    text = 'MMLU: keep the option "None", which the official script reads as "nan"'
    add("--fix-none", text, action="store_true")
    add("--skip-malformed", "skip and count malformed rows of the benchmarks", action="store_true")
    add("--texts", "ppl: folder with a text file for each language", metavar="D")
    text = "humaneval, skills: permit running the code that the model writes"
    add("--allow-code", text, action="store_true")
    run.set_defaults(**_OF_CHOICES)
    add("--shard", "answer only the I-th (from 0) of N parts; `eval report` joins them", metavar="I/N")
    add_device(run)
    add_tensor_parallel(run)
    add("--threads", "CPU threads (default: all cores)", type=whole(1, 1024), metavar="N")

    add = flags(report)
    add("runs", "output folders of `eval run`", nargs="+", metavar="DIR")
    add("--out", "folder for the report (default: the first run's)", metavar="DIR")

    add = flags(compare)
    add("first", "output folder of a run", metavar="FIRST")
    add("second", "output folder of the other run", metavar="SECOND")

    add = flags(fetch)
    add("sets", "mmlu, ceval, agieval, gaokao-bench (default: all)", nargs="*", metavar="SET")
    add("--data-dir", "folder to write (default: the cache)", metavar="D")


def run(args: argparse.Namespace) -> int:
    return {"run": _run, "report": _report, "compare": _compare, "fetch": _fetch}[args.action](args)


def data_folder(path: str | None) -> Path:
    """The data directory: the given one, or where ``fetch`` puts the benchmarks."""
    if path is not None:
        return Path(path).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "xverse" / "eval"


def _run(args: argparse.Namespace) -> int:
    shard = _shard(args.shard)
    if args.adaptive is not None and (args.limit is not None or args.shard is not None):
        raise UserError("--adaptive chooses the questions itself; omit --limit and --shard")
    from xverse.config import choose
    from xverse.data.benchmarks.custom import is_description
    from xverse.data.benchmarks.questions import Options
    from xverse.eval import run as evaluation
    from xverse.eval.backends import load_backend
    from xverse.eval.benchmarks import BENCHMARKS
    from xverse.eval.generation import TaskSettings
    from xverse.eval.tasks import TASKS
    from xverse.files import check_writable

    names = list(dict.fromkeys(name for name in args.tasks.split(",") if name))
    if not names:
        raise UserError("--tasks: name at least one task")
    for name in names:
        if not is_description(name):
            choose("task", name, {**BENCHMARKS, **TASKS})
    others = [name for name in names if name in TASKS]
    if others and args.adaptive is not None:
        raise UserError(
            f"--adaptive samples multiple-choice questions, and {others[0]} has none; omit one of them"
        )
    if "humaneval" in others and not args.allow_code:
        raise UserError("humaneval runs code that the model writes; pass --allow-code to permit it")
    if len(others) == len(names):
        needed = "a multiple-choice benchmark in --tasks"
        refuse_unused(args, needed, **_OF_CHOICES)
    if "mmlu" not in names:
        refuse_unused(args, "mmlu in --tasks", fix_none=False)
    if "ppl" not in names:
        refuse_unused(args, "ppl in --tasks", texts=None)
    if not {"humaneval", "skills"} & set(names):
        refuse_unused(args, "humaneval or skills in --tasks", allow_code=False)
    data_dir = data_folder(args.data_dir)
    benchmarks = evaluation.load_benchmarks(
        [name for name in names if name not in TASKS],
        data_dir,
        options=Options(split=args.split, fix_none=args.fix_none),
        limit=args.limit,
        skip_malformed=args.skip_malformed,
    )
    out = Path(args.out).expanduser()
    check_writable(out)
    backend = load_backend(
        args.model,
        which=args.backend,
        quantize=args.quantize,
        threads=args.threads,
        kv_dtype=args.kv_dtype,
        device=args.device,
        tensor_parallel=args.tensor_parallel,
    )
    settings = {
        "model": args.model,
        "quantize": args.quantize,
        "kv_dtype": args.kv_dtype,
        "backend": type(backend).__name__,
        "dtype": backend.dtype,
        "shots": args.shots,
        "limit": args.limit,
        **({} if args.adaptive is None else {"adaptive": args.adaptive / 100}),
        "fix_none": args.fix_none,
        "texts": args.texts,
        **({"allow_code": args.allow_code} if "skills" in others else {}),  # programs run, or are only parsed
    }
    facts = evaluation.to_folder(benchmarks, backend, out, settings, shard=shard)
    if others and shard[0] == 0:
        texts = None if args.texts is None else Path(args.texts).expanduser()
        task_settings = TaskSettings(limit=args.limit, allow_code=args.allow_code, texts=texts)
        evaluation.run_tasks(others, backend, data_dir, out, task_settings)
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
        raise UserError(f"--shard: expected I/N with I from 0 to N - 1, found '{text}'")
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
