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
        help="change a key of the recipe, such as train.steps=100",
    )


def run(args: argparse.Namespace) -> int:
    from xverse.config import load
    from xverse.train import PretrainRecipe, pretrain

    recipe = load(PretrainRecipe, args.recipe, args.overrides)
    evaluate = None
    if recipe.evaluation is not None:
        from xverse.eval.during import evaluator

        wanted = recipe.evaluation
        evaluate = evaluator(wanted.tasks, wanted.data_dir, limit=wanted.limit, shots=wanted.shots)
    model = pretrain(recipe, evaluate)
    if os.environ.get("RANK", "0") == "0":  # torchrun's: the result once
        print(model)
    return 0
