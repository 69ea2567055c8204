"""``xverse export``: write a model as a Hugging Face or Llama directory or as GGUF, and measure parity."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from xverse.config import UserError
from xverse.device import add_device, compute_device, guard
from xverse.place import output
from xverse.values import add_model, flags

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xverse.formats import ModelDirectory
    from xverse.model import XverseForCausalLM

TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # types of a directory's weights
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
SHARD_SIZE = "2GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def arguments(parser: argparse.ArgumentParser) -> None:
    add = flags(parser)
    add_model(parser)
    add("--adapter", "an adapter in peft's format to merge into the weights", metavar="A")
    add("--out", "the directory or NAME.gguf to write; a path or URL", required=True, metavar="OUT")
    text = (
        "hf: XVERSE for transformers; llama: for programs that load LlamaForCausalLM; "
        "gguf: one file for llama.cpp, Ollama and LM Studio"
    )
    add("--format", text, required=True, choices=["hf", "llama", "gguf"])
    text = (
        "type of the weights: f32, f16 or bf16 (default: as stored); "
        "for gguf f32, f16 (default), bf16, q8_0 or q4_0"
    )
    add("--type", text, choices=list(dict.fromkeys([*TYPES, *GGUF_TYPES])))
    text = f"maximum size of a weight file, such as 500MB (default: {SHARD_SIZE}); not for gguf"
    add("--max-shard-size", text, metavar="SIZE")
    text = "quantise the weights after merging --adapter; for --format hf"
    add("--quantize", text, choices=["int8", "int4"])
    add_device(parser)
    add("--overwrite", "replace an existing model at OUT", action="store_true")


def run(args: argparse.Namespace) -> int:
    types = GGUF_TYPES if args.format == "gguf" else tuple(TYPES)
    if args.type and args.type not in types:
        raise UserError(
            f"--type {args.type}: not a type of --format {args.format} (known: {', '.join(types)})"
        )
    device = _device(args)
    with guard(device), output(args.out, args.overwrite) as args.out:
        if args.quantize:
            return _export_quantized(args, device)
        if args.format == "gguf":
            return _export_gguf(args, device)
        return _export_directory(args, device)


def _device(args: argparse.Namespace) -> torch.device:
    """The device to compute on; ``auto`` is the CPU if the GPU has no room for the weights in float32."""
    device = compute_device(args.device)
    if args.device == "auto" and device.type == "cuda":
        from xverse.formats import ModelDirectory
        from xverse.hardware import available_memory

        if 4 * ModelDirectory.named(args.model).config.num_parameters() > available_memory(device):
            return compute_device("cpu")
    return device


def _export_directory(args: argparse.Namespace, device: torch.device) -> int:
    shard_bytes = parse_size(args.max_shard_size or SHARD_SIZE)

    import torch

    from xverse.formats import ModelDirectory, load_model
    from xverse.formats.compare import difference, fixed_tokens, logits
    from xverse.formats.write import check_target, save_hf, save_llama

    out = Path(args.out).expanduser()
    check_target(out, args.overwrite)
    source = ModelDirectory.named(args.model)
    tokenizer = source.tokenizer
    model = load_merged(source, args.adapter, device)
    stored = model.lm_head.weight.dtype
    dtype = getattr(torch, TYPES[args.type]) if args.type else stored
    save = save_hf if args.format == "hf" else save_llama
    save(
        model,
        tokenizer,
        out,
        dtype,
        generation_config=source.generation_config,
        max_shard_bytes=shard_bytes,
        overwrite=args.overwrite,
        documents=source.path if source.path.is_dir() else None,
    )
    expected = logits(model, fixed_tokens(model.config.vocab_size))
    del model  # the two do not fit on a GPU together
    exported = load_model(out, device=device) if args.format == "hf" else _stock_llama(out, dtype).to(device)
    changed = difference(expected, exported)
    print(f"{out}: {args.format}, {str(dtype).removeprefix('torch.')}")
    print(f"parity: max |Δlogit| = {changed:.1e} in float32 against {args.model}")
    return _verdict(changed, lossless=dtype in (stored, torch.float32))


def load_merged(source: ModelDirectory, adapter: str | None, device: torch.device) -> XverseForCausalLM:
    """The dequantised model of a directory on ``device``; merges an adapter and prints the parity."""
    from xverse.formats import load_model

    if adapter is None:
        return load_model(source, device=device, dequantize=True)
    from xverse.formats.adapters import differences
    from xverse.formats.compare import fixed_tokens, logits

    model, before = _merge(source, adapter, device)
    difference, divergence = differences(before, logits(model, fixed_tokens(model.config.vocab_size)))
    print(
        f"merged {adapter}: max |Δlogit| = {difference:.1e}, KL = {divergence:.1e} nats against the unmerged "
        "adapter"
    )
    return model


def _merge(
    source: ModelDirectory, adapter: str, device: torch.device
) -> tuple[XverseForCausalLM, torch.Tensor]:
    """The merged, dequantised model, and the logits of the unmerged adapter, float32 [B, T, V]."""
    from xverse.formats import load_model
    from xverse.formats.adapters import check_adapter, check_base, fingerprint, merge_and_logits

    check_adapter(adapter)  # before reading a large model
    if source.scheme is None:
        return merge_and_logits(load_model(source, device=device), adapter, source.path)
    check_base(lambda: fingerprint(load_model(source)), adapter, source.path)
    return merge_and_logits(load_model(source, device=device, dequantize=True), adapter)


def _export_quantized(args: argparse.Namespace, device: torch.device) -> int:
    if not args.adapter or args.format != "hf" or args.type or args.max_shard_size:
        raise UserError(
            "--quantize needs --adapter and --format hf, without --type and --max-shard-size; to quantise a "
            "model, use xverse quantize"
        )

    from xverse.formats import ModelDirectory, load_model
    from xverse.formats.adapters import differences
    from xverse.formats.compare import fixed_tokens, logits
    from xverse.formats.quantize import quick_settings
    from xverse.formats.write import check_target, save_quantized
    from xverse.quant.quantizer import Quantizer

    out = Path(args.out).expanduser()
    check_target(out, args.overwrite)
    source = ModelDirectory.named(args.model)
    tokenizer = source.tokenizer
    model, before = _merge(source, args.adapter, device)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def read(prefix: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    quantizer = Quantizer(model.config, read, quick_settings(args.quantize, model.config))
    save_quantized(
        ((name, tensor.cpu()) for name, tensor in quantizer.tensors()),
        model.config,
        tokenizer,
        out,
        generation_config=source.generation_config,
        overwrite=args.overwrite,
        documents=source.path,
    )
    tokens = fixed_tokens(model.config.vocab_size)
    difference, divergence = differences(
        before, logits(load_model(out, device=device, dequantize=True), tokens)
    )
    print(f"{out}: hf, {args.quantize}, {args.adapter} merged")
    print(f"parity: max |Δlogit| = {difference:.1e}, KL = {divergence:.1e} nats against the unmerged adapter")
    return 0


def _export_gguf(args: argparse.Namespace, device: torch.device) -> int:
    if args.max_shard_size:
        raise UserError("--max-shard-size: GGUF is one file; omit the flag")

    from xverse.formats import ModelDirectory, parity
    from xverse.formats.gguf import check_file, licence_of, save_gguf
    from xverse.formats.gguf_read import open_gguf
    from xverse.formats.spm import random_differences

    out = Path(args.out).expanduser()
    check_file(out, args.overwrite)
    source = ModelDirectory.named(args.model)
    tokenizer = source.tokenizer
    model = load_merged(source, args.adapter, device)
    kind = args.type or "f16"
    vocabulary = save_gguf(
        model,
        tokenizer,
        out,
        kind,
        name=Path(args.model).name,
        licence=licence_of(source.path),
        generation_config=source.generation_config,
        overwrite=args.overwrite,
    )
    difference = parity(model, open_gguf(out))
    print(f"{out}: gguf, {kind}, {out.stat().st_size / 1e6:,.1f} MB")
    print(f"parity: max |Δlogit| = {difference:.1e} in float32 against {args.model}")
    if any(vocabulary.scores):  # sentencepiece's algorithm; byte-level merges are stored as they are
        texts = 2000
        different = random_differences(tokenizer, vocabulary, texts)
        print(f"tokenizer: llama.cpp's ids differ from xverse's for {different} of {texts:,} random texts")
    return _verdict(difference, lossless=TYPES.get(kind) == str(model.lm_head.weight.dtype)[len("torch.") :])


def _verdict(difference: float, lossless: bool) -> int:
    from xverse.formats.compare import TOLERANCE
    from xverse.log import notice

    if lossless and not difference <= TOLERANCE:  # `not <=` catches NaN
        notice(f"export: this conversion is lossless, so the figure should be at most {TOLERANCE:.0e}")
        return 1
    return 0


def _stock_llama(path: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype)


def parse_size(text: str) -> int:
    """Bytes from ``500MB`` or ``2GB`` (powers of ten). Raises UserError for anything else."""
    size = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMG]?)B?", text.strip().upper())
    if not size or float(size[1]) == 0:
        raise UserError(f"--max-shard-size '{text}': expected a size such as 500MB or 2GB")
    return int(float(size[1]) * UNITS[size[2]])
