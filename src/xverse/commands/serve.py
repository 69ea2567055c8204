"""``xverse serve``: a model behind OpenAI's API."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from xverse.config import UserError, need

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STALLED_SECONDS = 60


def arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, help=text, **options)

    add("--model", "nano, a model directory or a hub id", default="nano", metavar="M")
    add("--tokenizer", "a directory with another tokenizer than the model's", metavar="T")
    add("--adapter", "an adapter in peft's format", metavar="A")
    add("--quantize", "make its weights smaller as it is loaded", choices=["int8", "int4"])
    add("--host", "address to listen on (%(default)s)", default="127.0.0.1", metavar="H")
    add("--port", "%(default)s; 0: any free one", type=_number, default=36000, metavar="P")
    add("--name", "the model's name in the API (default: its directory's)", metavar="NAME")
    add("--api-key-file", "keys, one a line; clients send one (also: XVERSE_API_KEY)", metavar="F")
    text = "host name that requests may carry beside the loopback names; '*' allows all"
    add("--allowed-host", text, action="append", metavar="H")
    add("--allowed-origin", "origin of web pages that may ask, as https://HOST", action="append", metavar="O")
    add("--page", "what the web page opens with; none: no page", choices=["chat", "generation", "none"])
    add("--max-batch", "requests at once (%(default)s)", type=_number, default=64, metavar="N")
    add("--max-waiting", "further ones that wait (%(default)s)", type=_number, default=256, metavar="N")
    add("--max-cache-tokens", "room of the key-value cache", type=_number, metavar="N")
    add("--kv-dtype", "type of the cache", choices=["auto", "int8"], default="auto")
    add("--speculate", "guess tokens from the text, verify several at once", action="store_true")
    add("--timeout", "seconds for a reply (%(default)s)", type=float, default=600.0, metavar="S")
    add("--max-body-mb", "largest body of a request (%(default)s)", type=float, default=4.0, metavar="MB")
    add("--threads", "CPU threads", type=_number, metavar="N")
    log = parser.add_mutually_exclusive_group()
    log.add_argument("--no-access-log", help="no line for each request on stderr", action="store_true")
    log.add_argument("--log-contents", help="requests and replies in that line", action="store_true")


def run(args: argparse.Namespace) -> int:
    if args.timeout <= 0:
        raise UserError(f"--timeout: {args.timeout:g} seconds are out of range (above 0)")
    if args.max_body_mb <= 0:
        raise UserError(f"--max-body-mb: {args.max_body_mb:g} is out of range (above 0)")
    keys = read_keys(args.api_key_file)
    uvicorn = need("uvicorn", "serve", "xverse serve")
    need("fastapi", "serve", "xverse serve")
    need("prometheus_client", "serve", "xverse serve")
    need("llguidance", "serve", "xverse serve")
    from starlette.middleware.cors import CORSMiddleware

    from xverse.log import notice
    from xverse.serve.app import create_app
    from xverse.serve.guard import Guard
    from xverse.serve.start import load_service

    if args.host not in LOOPBACK and not keys:
        notice(
            f"serve: {args.host} can be reached from other machines and there is no API key: "
            "whoever reaches it may use it (--api-key-file F)"
        )
    origins = [_origin(given) for given in args.allowed_origin or []]
    page = _page(args.page)
    with listen(args.host, args.port) as listener:
        service = load_service(args)
        app: Any = Guard(
            create_app(service, page),
            hosts=allowed_hosts(args.host, args.allowed_host or []),
            keys=keys,
            max_body=int(args.max_body_mb * 1e6),
            log=not args.no_access_log,
            origins=origins,
            contents=args.log_contents,
        )
        if origins:  # outside the guard: a browser asks for permission before it sends a key
            app = CORSMiddleware(
                app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(args.timeout) + 1
        )
        server = uvicorn.Server(config)

        def die() -> None:
            server.should_exit = True

        service.runner.on_death = die
        # uvicorn ends what runs and then raises the signal once more, for whoever handled it before.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {service.name} at http://{shown}:{port}", flush=True)
        server.run(sockets=[listener])
    if service.runner.dead:
        print(f"xverse: the engine died: {service.runner.dead}", file=sys.stderr)
        return 1
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded: an address that is taken should not cost minutes."""
    if not 0 <= port < 65536:
        raise UserError(f"--port: {port} is out of range (0 to 65535)")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client that reads nothing for so long has left (Linux)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
        return listener
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


def allowed_hosts(host: str, more: list[str]) -> list[str] | None:
    """Names that a request may carry; None: any. Of who listens on every address nobody knows them all."""
    if "*" in more or (host in ("0.0.0.0", "::") and not more):
        return None
    return [*LOOPBACK, host, *more]


def _origin(given: str) -> str:
    parts = urllib.parse.urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
        raise UserError(f"--allowed-origin: '{given}' is no origin; one reads https://example.org")
    return given.lower()


def _page(asked: str | None) -> str | None:
    """The tab that the web page opens with. Without Gradio there is no page, unless one was asked for."""
    if asked == "none":
        return None
    if asked is None:
        return None if importlib.util.find_spec("gradio") is None else "chat"
    need("gradio", "web", "the web page", load=False)
    return asked


def read_keys(path: str | None) -> list[str]:
    """The keys of a file, one a line, and that of the environment."""
    keys: list[str] = []
    if path is not None:
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file: {path} cannot be read ({error})") from None
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise UserError(f"--api-key-file: there is no key in {path}")
    if os.environ.get("XVERSE_API_KEY"):
        keys.append(os.environ["XVERSE_API_KEY"])
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError("API keys are printable ASCII without blanks")
    return keys


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)
