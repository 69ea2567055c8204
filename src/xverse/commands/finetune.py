"""``xverse finetune``: a recipe, or the flags of LLaMA-Factory and transformers."""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.finetune.settings import Settings

HELP = {
    "stage": "supervised fine-tuning, continued pretraining, preferences",
    "finetuning_type": "all weights, an adapter, or some layers",
    "template": "XVERSE's chat format, also called default",
    "dataset": "names of dataset_info.json, files or folders, parted by commas",
    "dataset_dir": "the folder of dataset_info.json and its files",
    "cutoff_len": "longest example in tokens",
    "val_size": "held out of the dataset: a share, or a number of examples",
    "packing": "several examples in a row, none of which sees another",
    "padding_side": "stored in the tokenizer; training itself pads nothing",
    "overwrite_cache": "nothing is cached: accepted, without effect",
    "preprocessing_num_workers": "accepted, without effect: the tokenizer runs on all cores",
    "plot_loss": "draw loss.png",
    "evaluation_strategy": "the older name of eval_strategy",
    "deepspeed": "DeepSpeed's settings, a JSON file",
    "quantization_bit": "quantise the base as it is loaded (QLoRA)",
    "local_rank": "set by launchers of several processes",
    "adapter_name_or_path": "an adapter to go on with",
    "streaming": "read the data set as it is needed; with max_steps",
    "buffer_size": "examples of a stream that are mixed at a time",
    "group_by_length": "the rows of a step are about equally long",
    "train_sampling_strategy": "transformers' name of the same",
    "pref_loss": "of stage dpo: DPO's, its variants, or ORPO, which needs no reference",
    "use_liger_kernel": "Liger's norms and activations, on CUDA",
    "enable_liger_kernel": "LLaMA-Factory's name of the same",
    "report_to": "tensorboard or wandb",
    "early_stopping_steps": "stop after so many evaluations without a better one",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.HelpFormatter  # the defaults stand in the dataclass
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE.yaml",
        help="recipes/nano/sft.yaml, or the flags below as YAML (recipes/sft/full.yaml)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change a key of the recipe, such as train.steps=100",
    )
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": HELP.get(field.name)}
        kind = kinds[0] if kinds and typing.get_origin(hints[field.name]) is not typing.Literal else None
        kind = kind or hints[field.name]
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = list(typing.get_args(kind))
            options["type"] = type(options["choices"][0])
        elif kind is bool:
            options |= {"nargs": "?", "const": True, "type": _truth, "metavar": "true|false"}
        else:
            options |= {"type": str if kind is Path else kind, "metavar": "X" if kind is str else "N"}
            if kind is Path:
                options["metavar"] = "DIR"
        names = [f"--{field.name}"]
        if field.name == "local_rank":
            names.append("--local-rank")  # as torch.distributed.launch writes it
        parser.add_argument(*names, **options)


def run(args: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(args).items() if name not in ("recipe", "overrides")}
    if args.recipe is None:
        return _run_flags(given, "finetune")
    from xverse.config import load, override, read_yaml

    if "model_name_or_path" in read_yaml(args.recipe):
        values = override(read_yaml(args.recipe), args.overrides)
        return _run_flags({**values, **given}, args.recipe)
    if given:
        raise UserError(f"--{next(iter(given))}: {args.recipe} is no recipe of flags; write key=value")

    from xverse.finetune import FinetuneRecipe, finetune

    model = finetune(load(FinetuneRecipe, args.recipe, args.overrides))
    if os.environ.get("RANK", "0") == "0":  # torchrun's: the result once
        print(model)
    return 0


def _run_flags(values: dict[str, Any], where: str) -> int:
    from xverse.finetune.settings import read_settings

    if not values:
        raise UserError("finetune: name a recipe, or give flags (xverse finetune --help lists them)")
    settings = read_settings(values, where)

    from xverse.finetune.run import run_finetuning

    target = run_finetuning(settings)
    if target is not None:
        print(target)
    return 0


def _truth(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
