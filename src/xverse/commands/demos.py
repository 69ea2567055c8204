"""``chat_demo.py`` and ``text_generation_demo.py``: ``xverse serve`` under XVERSE's own flags."""

from __future__ import annotations

import argparse

from xverse import cli


def main(page: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", default="36000", help="%(default)s")
    parser.add_argument("--model_path", default="nano", metavar="M", help="directory, hub id, nano")
    parser.add_argument("--tokenizer_path", metavar="T", help="default: the model's own")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    args = parser.parse_args()
    flags = ["serve", "--page", page, "--port", args.port, "--model", args.model_path]
    flags += ["--tokenizer", args.tokenizer_path] if args.tokenizer_path else []
    flags += ["--quantize", args.quantize] if args.quantize else []
    return cli.main([*flags, "--no-access-log"])
