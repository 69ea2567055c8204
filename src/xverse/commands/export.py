"""``xverse export``: write a model as a Hugging Face or Llama directory and say how exact it is."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from xverse.config import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", metavar="M", help="a directory, a hub id, or nano")
    parser.add_argument("--out", required=True, metavar="PATH", help="the directory to write")
    parser.add_argument(
        "--format",
        required=True,
        choices=["hf", "llama"],
        help="hf: XVERSE for transformers; llama: for every program that loads LlamaForCausalLM",
    )
    parser.add_argument("--type", choices=list(TYPES), help="weights' type (default: as they are stored)")
    parser.add_argument(
        "--max-shard-size", default="2GB", metavar="SIZE", help="largest weight file: 500MB, 2GB, …"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model directory at PATH")


def run(args: argparse.Namespace) -> int:
    shard_bytes = parse_size(args.max_shard_size)

    import torch

    from xverse.formats import load_model, load_tokenizer, parity, read_generation_config, resolve
    from xverse.formats.compare import TOLERANCE
    from xverse.formats.write import check_target, save_hf, save_llama
    from xverse.log import notice

    out = Path(args.out).expanduser()
    check_target(out, args.overwrite)
    source = resolve(args.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source)
    stored = model.lm_head.weight.dtype
    dtype = getattr(torch, TYPES[args.type]) if args.type else stored
    save = save_hf if args.format == "hf" else save_llama
    save(
        model,
        tokenizer,
        out,
        dtype,
        generation_config=read_generation_config(source),
        max_shard_bytes=shard_bytes,
        overwrite=args.overwrite,
        documents=source,
    )
    difference = parity(model, load_model(out) if args.format == "hf" else _stock_llama(out, dtype))
    print(f"{out}: {args.format}, {str(dtype).removeprefix('torch.')}")
    print(f"parity: max |Δlogit| = {difference:.1e} in float32 against {args.model}")
    if dtype in (stored, torch.float32) and not difference <= TOLERANCE:  # `not <=` catches NaN
        notice(f"export: this conversion loses nothing, so the figure should be at most {TOLERANCE:.0e}")
        return 1
    return 0


def _stock_llama(path: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype)


def parse_size(text: str) -> int:
    """Bytes from ``500MB`` or ``2GB`` (powers of ten). Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if not found or float(found[1]) == 0:
        raise UserError(f"--max-shard-size '{text}': write a size such as 500MB or 2GB")
    return int(float(found[1]) * UNITS[found[2]])
