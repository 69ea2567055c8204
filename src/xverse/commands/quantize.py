"""``xverse quantize``: write a model with 8-bit or 4-bit weights, and measure parity."""

from __future__ import annotations

import argparse
from pathlib import Path

from xverse.config import UserError
from xverse.device import add_device, compute_device, guard


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="nano", metavar="M", help="a directory, a hub id or nano (default: nano)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--bits", type=int, required=True, metavar="8|4", help="bits per weight")
    parser.add_argument(
        "--method",
        default="rtn",
        metavar="METHOD",
        help="rtn (default): round to nearest with searched scales per group; rtn-row: one scale per row, "
        "as in XVERSE's published models; gptq: GPTQ with --calibration",
    )
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="inputs per scale (default: 128)"
    )
    parser.add_argument("--calibration", metavar="FILE", default=None, help="UTF-8 text for --method gptq")
    parser.add_argument(
        "--format",
        choices=["hf", "llama"],
        default="hf",
        help="hf (default): XVERSE; llama: for programs that load a quantised LlamaForCausalLM "
        "(its output head is not quantised)",
    )
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model at DIR")


def run(args: argparse.Namespace) -> int:
    from xverse.config import choose
    from xverse.kernels.weight import check_bits, check_group_size

    check_bits(args.bits)
    check_group_size(args.group_size)
    choose("method", args.method, {name: name for name in ("rtn", "rtn-row", "gptq")})
    if args.method == "gptq" and args.calibration is None:
        raise UserError("--method gptq needs calibration text; give a file with --calibration")
    if args.method != "gptq" and args.calibration is not None:
        raise UserError(f"--calibration is only for --method gptq, not {args.method}")

    from xverse.formats import ModelDirectory
    from xverse.formats.quantize import progress_bar, quantize_directory
    from xverse.formats.write import check_target
    from xverse.quant.quantizer import QuantSettings
    from xverse.quant.text import calibration_tokens, parity_tokens

    out = Path(args.out).expanduser()
    check_target(out, args.overwrite)
    device = compute_device(args.device)
    source = ModelDirectory.named(args.model)
    config, tokenizer = source.config, source.tokenizer
    settings = QuantSettings(
        bits=args.bits,
        method=args.method,
        group_size=args.group_size,
        # transformers cannot load a quantised embedding, and ours stays in the mapped file anyway. Most
        # programs for Llama cannot load a quantised head either.
        embedding_bits=16,
        head_bits=16 if args.format == "llama" else None,
    )
    calibration = calibration_tokens(tokenizer, args.calibration) if args.calibration else None
    with progress_bar(config) as step, guard(device):
        report = quantize_directory(
            source,
            out,
            tokenizer,
            settings,
            llama=args.format == "llama",
            calibration=calibration,
            sample=parity_tokens(tokenizer, config.num_parameters()),
            overwrite=args.overwrite,
            report_progress=step,
            device=device,
        )
    groups = "one scale per row" if args.method == "rtn-row" else f"groups of {args.group_size}"
    print(f"{out}: {args.format}, {args.bits} bits, {args.method}, {groups}")
    for line in report.describe():
        print(line)
    return 0
