"""``xverse data prepare`` and ``xverse data show``."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="prepare|show")
    prepare = actions.add_parser("prepare", help="make token shards from a folder of text")
    prepare.add_argument("recipe", metavar="RECIPE.yaml", help="corpus, out, vocab_size, …")
    prepare.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )


def run(args: argparse.Namespace) -> int:
    return _prepare(args)


def _prepare(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from xverse.config import load
    from xverse.data.prepare import PrepareRecipe, prepare

    report = prepare(load(PrepareRecipe, args.recipe, args.overrides))
    table = Table("source", box=None, pad_edge=False)
    for column in ("documents", "held out", "tokens", "bytes/token"):
        table.add_column(column, justify="right")
    for row in report.sources:
        tokens = row.tokens + row.valid_tokens
        table.add_row(
            row.name,
            f"{row.documents:,}",
            f"{row.valid_documents:,}",
            f"{row.tokens:,}",
            f"{row.text_bytes / max(1, tokens):.2f}",
        )
    console = Console(highlight=False)
    console.print(table)
    total = sum(row.tokens for row in report.sources)
    held = sum(row.valid_tokens for row in report.sources)
    lines = sum(report.skipped_lines.values())
    print(
        f"{len(report.sources)} sources, {total:,} tokens for training, {held:,} held out, "
        f"{report.duplicates} exact duplicates removed, {lines} bad lines skipped"
    )
    for name, text in report.skipped.items():
        print(f"  {name}: {text}")
    return 0
