"""``xverse pretrain``."""

from __future__ import annotations

import argparse
import os

from xverse.values import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    add = flags(parser)
    add("recipe", "the recipe, such as recipes/nano/pretrain.yaml", metavar="RECIPE.yaml")
    add("overrides", "replace a key of the recipe, such as train.steps=100", nargs="*", metavar="key=value")
    text = "check the recipe for its cluster (mesh, shapes, memory, data) without training"
    add("--dry-run", text, action="store_true")


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
