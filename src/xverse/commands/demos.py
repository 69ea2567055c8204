"""``chat_demo.py`` and ``text_generation_demo.py``: ``xverse serve`` with the flags of XVERSE's demos."""

from __future__ import annotations

import argparse

from xverse import cli
from xverse.device import add_device


def main(page: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", default="36000", help="port to listen on (%(default)s)")
    parser.add_argument(
        "--model_path", default="nano", metavar="M", help="nano (the default), a model directory or a hub id"
    )
    parser.add_argument(
        "--tokenizer_path", metavar="T", help="directory with a tokenizer to use instead of the model's"
    )
    parser.add_argument("--quantize", choices=["int8", "int4"], help="quantise while loading")
    add_device(parser)
    args = parser.parse_args()
    flags = ["serve", "--page", page, "--port", args.port, "--model", args.model_path]
    flags += ["--tokenizer", args.tokenizer_path] if args.tokenizer_path else []
    flags += ["--quantize", args.quantize] if args.quantize else []
    flags += ["--device", args.device]
    return cli.main([*flags, "--no-access-log"])
