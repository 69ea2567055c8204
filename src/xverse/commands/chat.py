"""``xverse chat``: in the terminal, through a pipe, or a single reply with ``--ask`` or ``--complete``."""

from __future__ import annotations

import argparse
import io
import sys
from typing import Any

from xverse.commands.sampling import add_sampling_flags, given_sampling
from xverse.config import UserError
from xverse.device import add_device, add_tensor_parallel
from xverse.values import TEMPLATE_HELP, add_model, flags, whole


def arguments(parser: argparse.ArgumentParser) -> None:
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}  # absent from the namespace unless given
    add = flags(parser)
    add_model(parser)
    text = "directory with an adapter in peft's format; several with names, for /adapter"
    add("--adapter", text, action="append", metavar="[NAME=]A", **unset)
    add("--template", TEMPLATE_HELP, metavar="NAME", **unset)
    once = parser.add_mutually_exclusive_group()
    add = flags(once)
    add("--ask", "print the reply to TEXT and exit; -: read TEXT from stdin", metavar="TEXT", **unset)
    text = "print a continuation of TEXT and exit; -: read TEXT from stdin"
    add("--complete", text, metavar="TEXT", **unset)
    add = flags(parser)
    add("--system", "system prompt", metavar="TEXT", **unset)
    add("--quantize", "quantise the weights while loading", choices=["int8", "int4"], **unset)
    text = "do not keep what is typed for later sessions ($XDG_STATE_HOME/xverse/history)"
    add("--no-history", text, action="store_true")
    text = "CPU threads (default: chosen by the model's size)"
    add("--threads", text, type=whole(1, 1024), metavar="N", **unset)
    add_device(parser)
    add_tensor_parallel(parser)
    add_sampling_flags(parser, "How replies are generated")


def run(args: argparse.Namespace) -> int:
    given = vars(args)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for name in ("ask", "complete"):
        if given.get(name) == "-":
            given[name] = sys.stdin.read().removesuffix("\n")
    for name in ("ask", "complete", "system"):
        _check_text(name, given)
    if "complete" in given and "system" in given:
        raise UserError("--complete continues a plain text and takes no --system")
    overrides = given_sampling(args)

    from xverse.chat.session import load_session
    from xverse.chat.terminal import Terminal, show
    from xverse.engine.sampling_params import CHAT, COMPLETION
    from xverse.log import notice

    defaults = COMPLETION if "complete" in given else CHAT
    session = load_session(
        args.model,
        overrides,
        defaults=defaults,
        threads=given.get("threads"),
        quantize=given.get("quantize"),
        adapter=given.get("adapter"),
        template=given.get("template"),
        device=args.device,
        tensor_parallel=args.tensor_parallel,
        notify=notice,
    )
    session.system = given.get("system", "")
    if "ask" in given:
        show(session, session.reply(args.ask), sys.stdout)
        return 0
    if "complete" in given:
        show(session, session.complete(args.complete), sys.stdout)
        return 0
    return Terminal(session, sys.stdin, sys.stdout, str(args.model), not args.no_history).run()


def _check_text(name: str, given: dict[str, str]) -> None:
    text = given.get(name)
    if text is None:
        return
    if not text.strip():
        raise UserError(f"--{name}: the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{name}: the text is not valid UTF-8") from None
