"""``xverse finetune``."""

from __future__ import annotations

import argparse
import os


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

    model = finetune(load(FinetuneRecipe, args.recipe, args.overrides))
    if os.environ.get("RANK", "0") == "0":  # torchrun's: the result once
        print(model)
    return 0
