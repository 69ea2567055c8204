"""``xverse serve``: OpenAI's API over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import signal
import socket
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from xverse.commands.sampling import add_sampling_flags, given_sampling
from xverse.config import UserError, need
from xverse.device import add_device

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STALLED_SECONDS = 60


def arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, help=text, **options)

    add("--model", "nano (the default), a model directory or a hub id", default="nano", metavar="M")
    add("--tokenizer", "directory with a tokenizer to use instead of the model's", metavar="T")
    add("--adapter", "directory with an adapter in peft's format", metavar="A")
    add("--quantize", "quantise the weights while loading", choices=["int8", "int4"])
    add("--host", "address to listen on (%(default)s)", default="127.0.0.1", metavar="H")
    add("--port", "port to listen on (%(default)s); 0: any free", type=_number, default=36000, metavar="P")
    add("--name", "name of the model in the API (default: that of its directory)", metavar="NAME")
    add("--api-key-file", "file of API keys, one per line (also: XVERSE_API_KEY)", metavar="F")
    text = "host name that requests may use besides the loopback names; '*' allows all"
    add("--allowed-host", text, action="append", metavar="H")
    text = "origin of web pages that may use the API, such as https://HOST"
    add("--allowed-origin", text, action="append", metavar="O")
    text = "tab that the web page opens with (chat); none: no web page"
    add("--page", text, choices=["chat", "generation", "none"])
    add("--max-batch", "requests that run at once (%(default)s)", type=_number, default=64, metavar="N")
    add("--max-waiting", "requests that may wait (%(default)s)", type=_number, default=256, metavar="N")
    text = "capacity of the key-value cache in tokens (default: half of the free memory)"
    add("--max-cache-tokens", text, type=_number, metavar="N")
    text = "data type of the key-value cache; auto: the model's"
    add("--kv-dtype", text, choices=["auto", "int8"], default="auto")
    add("--speculate", "speculative decoding: propose tokens by n-gram lookup", action="store_true")
    add("--timeout", "time limit of a reply in seconds (%(default)g)", type=float, default=600.0, metavar="S")
    text = "size limit of a request body in MB (%(default)g)"
    add("--max-body-mb", text, type=float, default=4.0, metavar="MB")
    add("--threads", "CPU threads (default: chosen by the model's size)", type=_number, metavar="N")
    add_device(parser)
    log = parser.add_mutually_exclusive_group()
    log.add_argument("--no-access-log", help="write no log line per request to stderr", action="store_true")
    log.add_argument("--log-contents", help="include requests and replies in the log", action="store_true")
    add_sampling_flags(parser, "Defaults for requests that do not set a parameter")


def run(args: argparse.Namespace) -> int:
    for flag, value in (("--timeout", args.timeout), ("--max-body-mb", args.max_body_mb)):
        if not 0 < value < math.inf:
            raise UserError(f"{flag}: {value:g} is out of range (above 0)")
    sampling = given_sampling(args)
    keys = read_keys(args.api_key_file)
    uvicorn = need("uvicorn", "serve", "xverse serve")
    need("fastapi", "serve", "xverse serve")
    need("prometheus_client", "serve", "xverse serve")
    need("llguidance", "serve", "xverse serve")
    from starlette.middleware.cors import CORSMiddleware

    from xverse.log import notice
    from xverse.serve.app import create_app
    from xverse.serve.guard import Guard
    from xverse.serve.start import ServiceSettings, load_service

    if args.host not in LOOPBACK and not keys:
        notice(
            f"serve: {args.host} is reachable from other machines without an API key; set one with "
            "--api-key-file"
        )
    origins = [_origin(text) for text in args.allowed_origin or []]
    page = _page(args.page)
    with listen(args.host, args.port) as listener:
        names = {field.name for field in dataclasses.fields(ServiceSettings)} & vars(args).keys()
        settings = ServiceSettings(**{name: getattr(args, name) for name in names}, sampling=sampling)
        service = load_service(settings)
        app: Any = Guard(
            create_app(service, page),
            hosts=allowed_hosts(args.host, args.allowed_host or []),
            keys=keys,
            max_body=int(args.max_body_mb * 1e6),
            log=not args.no_access_log,
            origins=origins,
            contents=args.log_contents,
        )
        if origins:  # outside the guard: preflight requests carry no key
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
        # uvicorn finishes running requests and then raises the signal again for the previous handler.
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
    """A listening socket, bound before the model is loaded so that an address in use is reported at once."""
    if not 0 <= port < 65536:
        raise UserError(f"--port: {port} is out of range (0 to 65535)")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # drop clients that stop reading (Linux)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
        return listener
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


def allowed_hosts(host: str, more: list[str]) -> list[str] | None:
    """Host names that requests may use; None: any, also when listening on all addresses without ``more``."""
    if "*" in more or (host in ("0.0.0.0", "::") and not more):
        return None
    return [*LOOPBACK, host, *more]


def _origin(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
        raise UserError(f"--allowed-origin: '{text}' is not an origin; write https://example.org")
    return text.lower()


def _page(tab: str | None) -> str | None:
    """The tab that the web page opens with. ``tab`` None means chat, or no page without Gradio."""
    if tab == "none":
        return None
    if tab is None:
        return None if importlib.util.find_spec("gradio") is None else "chat"
    need("gradio", "web", "the web page", load=False)
    return tab


def read_keys(path: str | None) -> list[str]:
    """The keys in a file, one per line, and the one in the environment."""
    keys: list[str] = []
    if path is not None:
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file: {path} cannot be read ({error})") from None
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise UserError(f"--api-key-file: {path} contains no key")
    if os.environ.get("XVERSE_API_KEY"):
        keys.append(os.environ["XVERSE_API_KEY"])
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError("API keys must be printable ASCII without spaces")
    return keys


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)
