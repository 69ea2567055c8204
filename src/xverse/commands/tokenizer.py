"""``xverse tokenizer train``, ``repair`` and ``report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.values import add_actions, flags, positive, whole

if TYPE_CHECKING:
    from xverse.tokenizer.recipe import TokenizerRecipe
    from xverse.tokenizer.report import VocabularyReport

_FILES = "text files (.txt) or JSON lines with a text field (.jsonl, .jsonl.gz), or folders of them"
_VOCABULARY = "[NAME=]PATH: tokenizer.json or its directory, .tiktoken, sentencepiece's .model, .gguf"


def arguments(parser: argparse.ArgumentParser) -> None:
    train, repair, report = add_actions(
        parser,
        train="train a tokenizer of XVERSE's structure",
        repair="repair a tokenizer.json that current libraries refuse",
        report="report compression, byte fallback and round trip, compared with other vocabularies",
    )
    add = flags(train)
    add("--out", "output directory; overrides the recipe's", metavar="DIR")
    add("--vocab-size", "exact number of entries", type=whole(1), metavar="N")
    text = "maximum number of single characters (default: a third of the vocabulary)"
    add("--limit-alphabet", text, type=whole(1), metavar="N")
    add("--initial-characters", "characters that always get a token", metavar="TEXT")
    add("--min-frequency", "occurrences that a merge needs (default: 2)", type=whole(1), metavar="N")
    add("--memory-gb", "memory limit (default: 3)", type=positive(1e6), metavar="GB")
    add("--threads", "threads (default: all usable cores)", type=whole(1, 1024), metavar="N")
    add("files", f"{_FILES}; or a recipe, then key=value settings", nargs="+", metavar="FILE|RECIPE.yaml")
    add = flags(repair)
    add("source", "tokenizer.json or model directory to repair", metavar="IN")
    add("target", "file or directory to write; may be IN", metavar="OUT")
    add = flags(report)
    add("--tokenizer", _VOCABULARY, required=True, metavar="PATH")
    add("--against", "other vocabularies to compare with", nargs="+", default=[], metavar="PATH")
    add("--json", "print one JSON object instead of tables", action="store_true")
    add("--out", "also write report.md, report.json and report.png there", metavar="DIR")
    add("files", _FILES, nargs="+", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    return {"train": _train, "repair": _repair, "report": _report}[args.action](args)


def _train(args: argparse.Namespace) -> int:
    from xverse.config import UserError

    flags = {
        name: getattr(args, name)
        for name in (
            *("out", "vocab_size", "limit_alphabet", "initial_characters"),
            *("min_frequency", "memory_gb", "threads"),
        )
        if getattr(args, name) is not None
    }
    if args.files[0].endswith((".yaml", ".yml")):
        return _train_recipe(args.files[0], args.files[1:], flags)
    for name in ("out", "vocab_size"):
        if name not in flags:
            raise UserError(f"tokenizer train: --{name.replace('_', '-')} is missing (or give a recipe)")
    return _train_files(args.files, flags)


def _train_recipe(path: str, overrides: Sequence[str], flags: dict[str, Any]) -> int:
    from rich.console import Console
    from rich.table import Table

    from xverse.config import load
    from xverse.files import check_writable
    from xverse.tokenizer.recipe import TokenizerRecipe, train_recipe

    recipe = load(TokenizerRecipe, path, overrides, flags)
    check_writable(recipe.out)
    report = train_recipe(recipe)
    table = Table("language", box=None, pad_edge=False)
    for column in ("texts", "bytes", "distinct words", "weight", "single characters"):
        table.add_column(column, justify="right")
    for name, row in report["languages"].items():
        counts = (f"{row[key]:,}" for key in ("texts", "bytes", "different_words"))
        table.add_row(name, *counts, f"{row['weight']:.2%}", f"{row['single_characters']:.3%}")
    Console(highlight=False, markup=False).print(table)
    _summarise(report["vocab_size"], report["hash"], report)
    print(recipe.out)
    return 0


def _train_files(names: Sequence[str], flags: dict[str, Any]) -> int:
    from xverse.config import build
    from xverse.files import alone, check_writable
    from xverse.texts import find_files
    from xverse.tokenizer.recipe import TokenizerRecipe

    files = find_files(names)
    out = Path(flags["out"])
    check_writable(out)
    recipe = build(TokenizerRecipe, {"corpus": names[0], **flags}, "tokenizer train")
    with alone(
        out.with_name(f".{out.name}.lock"), f"{out}: another xverse tokenizer train is writing this one"
    ):
        _train_out(files, flags, recipe, out)
    return 0


def _train_out(files: Sequence[Path], flags: dict[str, Any], recipe: TokenizerRecipe, out: Path) -> None:
    from xverse.log import notice
    from xverse.tokenizer import native
    from xverse.tokenizer.counting import remove_counts
    from xverse.tokenizer.recipe import train_files

    if native.library() is None:
        notice("without xverse's compiled code, the tokenizers library trains with all texts in memory")
        _train_in_memory(files, flags)
        return
    # The next run reuses the counts of a killed one.
    counts = out.with_name(f".{out.name}.counts")
    tokenizer, figures = train_files(recipe, files, counts)
    tokenizer.save(out)
    remove_counts(counts)
    _summarise(tokenizer.vocab_size, tokenizer.hash, figures)
    print(out)


def _train_in_memory(files: Sequence[Path], flags: dict[str, Any]) -> None:
    from xverse.config import UserError
    from xverse.texts import ReadReport, read_texts
    from xverse.tokenizer import train_tokenizer

    options = {
        name: flags[name] for name in flags if name not in ("out", "vocab_size", "memory_gb", "threads")
    }
    report = ReadReport()
    texts = [text.decode() for path in files for text in read_texts(path, report)]
    if not texts:
        raise UserError(f"{files[0]}: no usable text in these files")
    tokenizer = train_tokenizer(texts, flags["vocab_size"], **options)
    tokenizer.save(flags["out"])
    _summarise(tokenizer.vocab_size, tokenizer.hash, {})
    print(flags["out"])


def _summarise(size: int, digest: str, figures: dict[str, Any]) -> None:
    from xverse.log import notice

    counts = ""
    if figures:
        notice(f"{figures['words']:,} distinct words; {figures['phases']} phases of merging")
        counts = f" ({figures['characters']:,} characters, {figures['merges']:,} merges)"
    notice(f"{size} entries{counts}, hash {digest}")


def _repair(args: argparse.Namespace) -> int:
    from xverse.tokenizer import repair_file

    changed = repair_file(args.source, args.target)
    print(f"{args.target}: {'repaired' if changed else 'nothing needed repair; copied'}")
    return 0


def _report(args: argparse.Namespace) -> int:
    import json

    from rich.console import Console
    from rich.table import Table

    from xverse.files import check_writable
    from xverse.texts import find_files
    from xverse.tokenizer import Tokenizer
    from xverse.tokenizer.report import as_json, by_file, in_detail, measure, overview
    from xverse.tokenizer.vocabularies import load_vocabulary

    files = find_files(args.files)
    if args.out:
        check_writable(Path(args.out))
    reports = [
        measure(load_vocabulary(name), files, notices=number == 0)
        for number, name in enumerate([args.tokenizer, *args.against])
    ]
    head: dict[str, Any] = {"tokenizer": args.tokenizer, "vocab_size": reports[0].vocabulary.size}
    if reports[0].vocabulary.decode is not None:
        path = args.tokenizer if Path(args.tokenizer).exists() else args.tokenizer.partition("=")[2]
        head["hash"] = Tokenizer.load(path).hash
    shown = as_json(reports)
    values = {**head, "unused": shown[0]["unused"], "files": shown[0]["files"], "against": shown[1:]}
    tables = [in_detail(reports[0]), overview(reports)]
    if len(reports) > 1:
        tables.append(by_file(reports))
    if args.out:
        _write_report(Path(args.out), tables, values, reports)
    if args.json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        width = None if sys.stdout.isatty() else 120  # otherwise a file would be wrapped at 80
        for rows in tables:
            table = Table(box=None, pad_edge=False)
            for number, column in enumerate(rows[0]):
                table.add_column(
                    column, **({"justify": "right", "no_wrap": True} if number else {"overflow": "fold"})
                )
            for row in rows[1:]:
                table.add_row(*row)
            Console(highlight=False, markup=False, width=width).print(table, "")
    return 0 if all(row.round_trip for row in reports[0].files) else 1


def _write_report(
    folder: Path,
    tables: Sequence[Sequence[Sequence[str]]],
    values: dict[str, Any],
    reports: Sequence[VocabularyReport],
) -> None:
    import json

    from xverse.files import atomic_file, write_text
    from xverse.markdown import table
    from xverse.tokenizer.report import plot

    lines = [line for head, *rows in tables for line in (*table(head, rows, "---:"), "")]
    write_text(folder / "report.md", "\n".join(lines))
    write_text(folder / "report.json", json.dumps(values, ensure_ascii=False, indent=1) + "\n")
    with atomic_file(folder / "report.png") as path:
        plot(reports, path)
