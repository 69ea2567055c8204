"""``chat_demo.py`` and ``text_generation_demo.py``: ``xverse serve`` with the flags of XVERSE's demos."""

from __future__ import annotations

import argparse

from xverse import cli
from xverse.device import add_device
from xverse.values import flag


def main(page: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    flag(parser, "--port", "port to listen on (%(default)s)", default="36000")
    text = "nano (the default), a model directory or a hub id"
    flag(parser, "--model_path", text, default="nano", metavar="M")
    flag(parser, "--tokenizer_path", "directory with a tokenizer to use instead of the model's", metavar="T")
    flag(parser, "--quantize", "quantise while loading", choices=["int8", "int4"])
    add_device(parser)
    args = parser.parse_args()
    flags = ["serve", "--page", page, "--port", args.port, "--model", args.model_path]
    flags += ["--tokenizer", args.tokenizer_path] if args.tokenizer_path else []
    flags += ["--quantize", args.quantize] if args.quantize else []
    flags += ["--device", args.device]
    return cli.main([*flags, "--no-access-log"])
