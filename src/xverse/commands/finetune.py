"""``xverse finetune``."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe, such as recipes/nano/sft.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change a key of the recipe, such as train.steps=100",
    )


def run(args: argparse.Namespace) -> int:
    from xverse.config import load
    from xverse.finetune import FinetuneRecipe, finetune

    print(finetune(load(FinetuneRecipe, args.recipe, args.overrides)))
    return 0
