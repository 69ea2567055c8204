"""``xverse pretrain``."""

from __future__ import annotations

import argparse
import os


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE.yaml", help="the recipe, such as recipes/nano/pretrain.yaml"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replace a key of the recipe, such as train.steps=100",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe for its cluster (mesh, shapes, memory, data) without training",
    )


def run(args: argparse.Namespace) -> int:
    from xverse.config import load
    from xverse.launcher import end_with_launcher
    from xverse.place import Place

    end_with_launcher()  # before torch is imported, which takes seconds
    from xverse.train import PretrainRecipe, pretrain

    recipe = load(PretrainRecipe, args.recipe, args.overrides)
    if args.dry_run:
        from xverse.train.dryrun import dry_run

        print(dry_run(recipe))
        return 0
    evaluate = None
    if recipe.evaluation is not None:
        from xverse.eval.during import evaluator

        settings = recipe.evaluation
        evaluate = evaluator(settings.tasks, settings.data_dir, limit=settings.limit, shots=settings.shots)
    pretrain(recipe, evaluate)
    if os.environ.get("RANK", "0") == "0":  # set by torchrun: print the result once
        print(Place.of(recipe.out) / "model")
    return 0
