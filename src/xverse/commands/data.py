"""``xverse data prepare`` and ``xverse data show``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.config import UserError
from xverse.values import add_actions, flags, refuse_unused, whole

if TYPE_CHECKING:
    from xverse.data.feed import PretrainFeed
    from xverse.tokenizer import Tokenizer

# Flags of data show that belong to --dataset, with their defaults.
_OF_EXAMPLES: dict[str, Any] = {
    "dataset_dir": "data",
    "stage": "sft",
    "cutoff_len": 2048,
    "identity": [],
    "model": "nano",
    "index": 0,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    prepare, show = add_actions(
        parser,
        prepare="make a tokenizer and token shards from text",
        show="show a mixture as a tree, or a fine-tuning example coloured by its loss mask",
    )
    add = flags(prepare)
    add("recipe", "recipe; docs/data.md describes its keys", metavar="RECIPE.yaml")
    add("overrides", "settings that override the recipe's", nargs="*", metavar="key=value")
    add = flags(show)
    text = "a recipe or a prepared folder (a path or URL), to show its mixture"
    add("recipe", text, nargs="?", metavar="RECIPE|FOLDER")
    add("overrides", "settings that override the recipe's", nargs="*", metavar="key=value")
    add("--mixture", "mixture file that replaces the recipe's mixture", metavar="FILE")
    add("--dataset", "fine-tuning data: a name in dataset_info.json, a file or a hub id", metavar="D")
    add("--dataset-dir", "folder with dataset_info.json", metavar="DIR")
    add("--stage", "how to read --dataset", choices=["sft", "pt", "dpo"])
    add("--cutoff-len", "maximum length of an example in tokens", type=whole(8, 10**9), metavar="N")
    add("--identity", "values for {{placeholders}} in the data", nargs="+", metavar="KEY=VALUE")
    add("--model", "model whose tokenizer is used", metavar="M")
    add("--index", "number of the example, from 0", type=whole(), metavar="N")
    show.set_defaults(**_OF_EXAMPLES)


def run(args: argparse.Namespace) -> int:
    if args.action == "prepare":
        return _prepare(args)
    if (args.recipe is None) == (args.dataset is None):
        raise UserError("data show: give a recipe or a prepared folder, or --dataset D --model M")
    if args.dataset:
        refuse_unused(args, "a recipe or folder", mixture=None)
        return _show_example(args)
    refuse_unused(args, "--dataset", **_OF_EXAMPLES)
    return _show_mixture(args)


def _prepare(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from xverse.config import load, need

    need("datatrove", "data", "data prepare", load=False)
    need("zstandard", "data", "data prepare", load=False)
    from xverse.data.prepare.pipeline import PrepareRecipe, prepare
    from xverse.data.prepare.plan import first_of
    from xverse.place import Place

    recipe = load(PrepareRecipe, args.recipe, args.overrides)
    report = prepare(recipe)
    if report is None:
        print(
            "submitted; run this command again when the jobs have left the queue: it prints the report or "
            "submits what is missing"
        )
        return 0
    table = Table("source", box=None, pad_edge=False)
    for column in ("documents", "held out", "bad lines", "tokens", "bytes/token"):
        table.add_column(column, justify="right")
    for row in report.sources:
        size = row.text_bytes / max(1, row.tokens + row.valid_tokens)
        figures: tuple[int, ...] = (row.documents, row.valid_documents, row.skipped_lines, row.tokens)
        table.add_row(row.name, *(f"{figure:,}" for figure in figures), f"{size:.2f}")
    Console(highlight=False).print(table)
    total = sum(row.tokens for row in report.sources)
    held = sum(row.valid_tokens for row in report.sources)
    sources = f"{len(report.sources)} source{'s' if len(report.sources) != 1 else ''}"
    print(
        f"{sources}, {total:,} tokens for training, {held:,} held out; "
        f"{report.duplicates:,} exact duplicates removed"
    )
    if report.dropped:
        print("dropped: " + ", ".join(f"{count:,} by {stage}" for stage, count in report.dropped.items()))
    if recipe.stages.any():
        print(f"report: {Place.of(recipe.out) / 'report.md'}")
    for line in first_of(report.skipped):
        print(line)
    return 0


def _show_mixture(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.tree import Tree

    from xverse.data.mixture import PERIOD, Schedule

    feed, sequences = _feed(args)
    shares, epochs = feed.mixture.shares(), feed.mixture.epochs(sequences)
    tree = Tree(f"[bold]{feed.folder}[/]")
    categories: dict[str, list[str]] = {}
    for name, shard in feed.train.items():
        categories.setdefault(shard.header.category, []).append(name)
    for category, names in categories.items():
        share = sum(shares.get(name, 0.0) for name in names)
        tokens = sum(feed.train[name].header.tokens for name in names)
        branch = tree.add(f"{category}  {100 * share:.2f} %  {tokens:,} tokens")
        for name in sorted(names, key=lambda name: -shares.get(name, 0.0)):
            if name not in shares:
                branch.add(f"{name}  not drawn  {feed.train[name].header.tokens:,} tokens")
                continue
            text = f"{name}  {100 * shares[name]:.2f} %  {feed.train[name].header.tokens:,} tokens"
            branch.add(text + (f"  {epochs[name]:.2f} epochs" if sequences else ""))
    Console(highlight=False).print(tree)
    mixture = feed.mixture
    stages = (
        zip(mixture.starts, mixture.parts, strict=True) if isinstance(mixture, Schedule) else [(0, mixture)]
    )
    for start, part in stages:
        expected, drawn = part.shares(), part.simulate()
        worst = max(expected, key=lambda name: abs(drawn[name] - expected[name]))
        where = f"from sequence {start:,}: " if start else ""
        print(
            f"{where}drawn among {PERIOD:,} simulated sequences: every share within "
            f"{100 * abs(drawn[worst] - expected[worst]):.4f} points of the expected one"
        )
        if start or isinstance(mixture, Schedule):
            print("  " + ", ".join(f"{name} {100 * share:.2f} %" for name, share in expected.items()))
    return 0


def _feed(args: argparse.Namespace) -> tuple[PretrainFeed, int]:
    """The feed that the argument names, and the number of sequences of its run (0 unless a pretraining
    recipe)."""
    from xverse.config import is_url, load, read_yaml
    from xverse.data.feed import PretrainFeed
    from xverse.data.mixture import MixtureConfig

    path = Path(args.recipe)
    mixture = MixtureConfig(file=Path(args.mixture)) if args.mixture else MixtureConfig()
    if not path.exists() and not is_url(args.recipe):
        raise UserError(f"{path}: no such recipe or folder")
    if path.is_dir() or is_url(args.recipe):
        if args.overrides:
            raise UserError(f"'{args.overrides[0]}': only a recipe takes settings, not a folder")
        return PretrainFeed(args.recipe, mixture, 512, 0), 0
    if {"corpus", "inputs"} & set(read_yaml(path)):
        from xverse.data.prepare.pipeline import PrepareRecipe

        return PretrainFeed(load(PrepareRecipe, path, args.overrides).out, mixture, 512, 0), 0
    from xverse.train import PretrainRecipe

    recipe = load(PretrainRecipe, path, args.overrides)
    sequences = recipe.train.sequences(recipe.train.steps)
    feed = PretrainFeed(
        recipe.data,
        mixture if args.mixture else recipe.mixture,
        recipe.sequence_length,
        recipe.seed,
        sequences,
        recipe.train.sequences,
    )
    return feed, sequences


def _show_example(args: argparse.Namespace) -> int:
    """Print one example as fine-tuning encodes it, coloured by its loss mask."""
    from xverse.finetune.encode import load_data
    from xverse.finetune.settings import read_settings
    from xverse.formats import load_tokenizer, resolve

    values = {
        "model_name_or_path": args.model,
        "stage": args.stage,
        "dataset": args.dataset,
        "dataset_dir": args.dataset_dir,
        "identity": dict(_pair(text) for text in args.identity),
        "output_dir": ".",
        "do_train": True,
    }
    tokenizer = load_tokenizer(resolve(args.model))
    examples = load_data(read_settings(values, "data show"), tokenizer, args.cutoff_len).train
    if not 0 <= args.index < len(examples):
        raise UserError(f"--index {args.index}: there are {len(examples)} examples, numbered from 0")
    example = examples[args.index]
    _print_coloured(tokenizer, example.ids, example.mask)
    return 0


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--identity '{text}': expected KEY=VALUE")
    return key, value


def _print_coloured(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text()
    start = 0
    for stop in range(1, len(ids) + 1):  # runs of one colour: a character may span several tokens
        if stop == len(ids) or mask[stop] != mask[start]:
            piece = tokenizer.decode(ids[start:stop], skip_special=False)
            text.append(piece, style="bold green" if mask[start] else "dim")
            start = stop
    Console(highlight=False, soft_wrap=True).print(text)
    print(f"{len(ids)} tokens, {sum(mask)} with loss (bold green)")
