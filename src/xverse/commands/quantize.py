"""``xverse quantize``: write a model with weights of 8, 4, 3 or 2 bits, and measure parity."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from xverse.config import UserError
from xverse.device import add_device, compute_device, guard
from xverse.place import output
from xverse.values import add_model, flags


def arguments(parser: argparse.ArgumentParser) -> None:
    add = flags(parser)
    add_model(parser)
    add("--out", "the directory to write; a path or URL", required=True, metavar="OUT")
    add("--bits", "bits per weight; or give --bpw", type=int, metavar="8|4|3|2")
    text = (
        "instead of --bits: average bits per weight of everything but the embedding, such as 4.5; "
        "each layer gets 2, 3, 4 or 8 bits and groups of 128, 64 or 32 by its measured sensitivity"
    )
    add("--bpw", text, metavar="X")
    text = (
        "gptq (default with up to 4 bits and --bpw): round column by column and compensate each error; "
        "rtn (default with 8 bits): round to nearest with searched scales per group; rtn-row: one scale "
        "per row, as in XVERSE's published models"
    )
    add("--method", text, metavar="METHOD")
    text = "inputs per scale, at most: 128, 64 or 32 (default: 64 with gptq in up to 4 bits, otherwise 128)"
    add("--group-size", text, type=int, metavar="N")
    text = (
        "what weights of 4 bits are rounded to: the entries of a table that suits their distribution "
        "(default with --format hf), or integers, as other programs and the kernels of GPUs read them "
        "(default with --format llama and --method rtn-row)"
    )
    add("--levels", text, choices=["table", "integers"])
    text = "UTF-8 text to measure layer inputs on (default: the package's text in 41 languages and code)"
    add("--calibration", text, metavar="FILE")
    text = (
        "at last fit the scales and norms of all layers together to the source's predictions on the "
        "calibration text; for gptq and models of up to a billion parameters, which are held in memory"
    )
    add("--refine", text, action="store_true")
    text = (
        "hf (default): XVERSE; llama: for programs that load a quantised LlamaForCausalLM "
        "(its output head is not quantised)"
    )
    add("--format", text, choices=["hf", "llama"], default="hf")
    text = (
        "store 8 bits of --method rtn-row for programs that quantise activations while they run, such "
        "as vLLM (W8A8)"
    )
    add("--activations", text, choices=["int8"])
    add_device(parser)
    add("--overwrite", "replace an existing model at OUT", action="store_true")


def run(args: argparse.Namespace) -> int:
    with output(args.out, args.overwrite) as args.out:
        return _quantize(args)


def _quantize(args: argparse.Namespace) -> int:
    from xverse.config import choose
    from xverse.kernels.weight import check_bits, check_group_size

    if (args.bits is None) == (args.bpw is None):
        raise UserError("give either --bits (8, 4, 3 or 2) or --bpw (an average such as 4.5)")
    method = args.method
    if args.activations is not None:
        if args.bits != 8 or method not in (None, "rtn-row"):
            raise UserError("--activations int8 needs --bits 8 and --method rtn-row")
        method = "rtn-row"
    if method is not None:
        choose("method", method, {name: name for name in ("rtn", "rtn-row", "gptq")})
    if args.bits is not None:
        check_bits(args.bits)
    elif method == "rtn-row" or args.group_size is not None or args.format == "llama":
        raise UserError(
            "--bpw chooses groups itself; it excludes --method rtn-row, --group-size and --format llama"
        )
    integers = args.format == "llama" or method == "rtn-row"
    if args.bits in (2, 3) and (integers or args.levels == "integers"):
        raise UserError(
            f"--bits {args.bits} always has tables; it excludes --levels integers, --format llama and "
            "--method rtn-row"
        )
    if args.levels == "table" and (integers or args.bits == 8):
        raise UserError("--levels table is for up to 4 bits; it excludes --format llama and --method rtn-row")
    if args.group_size is not None:
        check_group_size(args.group_size)
    if method == "rtn-row" and args.calibration is not None:
        raise UserError("--calibration is for --method gptq and rtn; rtn-row measures nothing")

    from xverse.formats import ModelDirectory
    from xverse.formats.quantize import mixed_formats, progress_bar, quantize_directory
    from xverse.formats.write import check_target
    from xverse.log import notice
    from xverse.quant.mixing import describe_mix, parse_bits
    from xverse.quant.quantizer import WHOLE_PARAMETERS
    from xverse.quant.settings import default_settings, describe_groups
    from xverse.quant.text import calibration_tokens, default_calibration, loading_calibration, parity_tokens

    bits = None if args.bpw is None else parse_bits(args.bpw)
    out = Path(args.out).expanduser()
    check_target(out, args.overwrite)
    device = compute_device(args.device)
    source = ModelDirectory.named(args.model)
    config, tokenizer = source.config, source.tokenizer
    # Most programs for Llama cannot load a quantised head.
    settings = default_settings(
        args.bits or 4,
        method,
        args.group_size,
        head_bits=16 if args.format == "llama" else None,
        table=args.format == "hf" and args.levels != "integers",
    )
    if args.refine:
        if settings.method != "gptq" or config.num_parameters() > WHOLE_PARAMETERS:
            raise UserError("--refine is for --method gptq and models of up to a billion parameters")
        settings = dataclasses.replace(settings, refine=True)
    if args.calibration:
        calibration = calibration_tokens(tokenizer, args.calibration)
    elif settings.method == "gptq":
        calibration = default_calibration(tokenizer, config.num_parameters())
    else:  # the magnitude of each channel is all that is measured
        calibration = loading_calibration(tokenizer)
    if bits is not None:
        settings = dataclasses.replace(
            settings, formats=mixed_formats(source, bits, calibration, settings, device)
        )
    elif groups := describe_groups(settings, config):
        notice(f"quantize: {groups}")
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
            activations=args.activations is not None,
        )
    what = f"{settings.bits} bits"
    groups = "one scale per row" if settings.method == "rtn-row" else f"groups of {settings.group_size}"
    if bits is not None:
        what, groups = f"{bits:g} bits on average", describe_mix(settings.formats)
    print(f"{out}: {args.format}, {what}, {settings.method}, {groups}")
    for line in report.describe():
        print(line)
    return 0
