"""``xverse serve``: OpenAI's, Anthropic's and Ollama's APIs over HTTP."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import os
import signal
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse import values
from xverse.commands.sampling import add_sampling_flags, given_sampling
from xverse.config import UserError, need
from xverse.device import add_device, add_tensor_parallel

if TYPE_CHECKING:
    import socket

    from xverse.serve.start import ServiceSettings

HOST, PORT = "127.0.0.1", 36000
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_service_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the model, its engine and the defaults of requests."""
    add = values.flags(parser)
    values.add_model(parser)
    add("--tokenizer", "directory with a tokenizer to use instead of the model's", metavar="T")
    add("--template", values.TEMPLATE_HELP, metavar="NAME")
    text = "directory with an adapter in peft's format; several with names, which requests send as model"
    add("--adapter", text, action="append", metavar="[NAME=]A")
    text = "highest rank of an adapter with a name (default: 64)"
    add("--max-lora-rank", text, type=values.whole(1, 1024), default=argparse.SUPPRESS, metavar="N")
    add("--quantize", "quantise the weights while loading", choices=["int8", "int4"])
    add("--max-batch", "requests that run at once", type=_count, default=64, metavar="N")
    add("--max-waiting", "requests that may wait", type=_count, default=256, metavar="N")
    text = "capacity of the key-value cache in tokens (default: by the free memory)"
    add("--max-cache-tokens", text, type=values.whole(32), metavar="N")
    text = "part of the cache in MiB that keeps the beginnings of earlier prompts; 0: none"
    add("--prefix-cache-mb", text, type=values.whole(0, 1 << 24), default=2048, metavar="MB")
    text = "data type of the key-value cache; auto: the model's"
    add("--kv-dtype", text, choices=["auto", "int8"], default="auto")
    add("--speculate", "speculative decoding: propose tokens by n-gram lookup", action="store_true")
    text = "the same bits whatever else the server computes, on a CPU (default: where it costs little)"
    add("--batch-invariant", text, action=argparse.BooleanOptionalAction, default=None)
    text = "time limit of a reply in seconds (default: %(default)g)"
    add("--timeout", text, type=values.positive(1e7), default=600.0, metavar="S")
    text = "CPU threads (default: chosen by the model's size)"
    add("--threads", text, type=values.whole(1, 1024), metavar="N")
    add_device(parser)
    add_tensor_parallel(parser)
    add_sampling_flags(parser, "Defaults for requests that do not set a parameter")


def service_settings(args: argparse.Namespace, sampling: dict[str, Any]) -> ServiceSettings:
    from xverse.serve.start import ServiceSettings

    names = {field.name for field in dataclasses.fields(ServiceSettings)} & vars(args).keys()
    return ServiceSettings(**{name: getattr(args, name) for name in names}, sampling=sampling)


def arguments(parser: argparse.ArgumentParser) -> None:
    add = values.flags(parser)
    host = values.host_name
    add("--host", f"address to listen on (default: {HOST})", type=host, metavar="H")
    text = f"port to listen on (default: {PORT}); 0: any free one"
    add("--port", text, type=values.whole(0, 65535), metavar="P")
    add("--uds", "Unix socket to listen on instead of --host and --port", metavar="PATH")
    add("--tls-cert", "certificate chain in PEM; with --tls-key the server speaks HTTPS", metavar="F")
    add("--tls-key", "private key in PEM, unencrypted", metavar="F")
    text = "path that the server is reached under behind a proxy, such as /xv"
    add("--root-path", text, type=values.sub_path, metavar="PATH")
    text = "address or network of a proxy whose X-Forwarded-For is believed (default: 127.0.0.1 and ::1)"
    add("--trusted-proxy", text, type=values.network, action="append", metavar="A")
    add("--name", "name of the model in the API (default: that of its directory)", metavar="NAME")
    text = "folder from which adapters may be loaded at run time, by /v1/load_lora_adapter"
    add("--adapter-folder", text, metavar="DIR")
    text = "folder for /v1/files and /v1/batches, which are off without it"
    add("--batch-folder", text, metavar="DIR")
    add("--api-key-file", "file of API keys, one per line (also: XVERSE_API_KEY)", metavar="F")
    text = "host name that requests may use besides the loopback names; '*' allows all"
    add("--allowed-host", text, type=values.allowed_host, action="append", metavar="H")
    text = "origin of web pages that may use the API, such as https://HOST"
    add("--allowed-origin", text, type=_origin, action="append", metavar="O")
    text = "tab that the web page opens with; none: no web page"
    add("--page", text, choices=["chat", "generation", "none"], default="chat")
    text = "size limit of a request body in MB (default: %(default)g)"
    add("--max-body-mb", text, type=values.positive(1000), default=4.0, metavar="MB")
    log = parser.add_mutually_exclusive_group()
    log.add_argument("--no-access-log", help="write no log line per request to stderr", action="store_true")
    log.add_argument("--log-contents", help="include requests and replies in the log", action="store_true")
    add_service_flags(parser)


def run(args: argparse.Namespace) -> int:
    from xverse.serve.keys import read_keys

    sampling = given_sampling(args)
    keys = read_keys(args.api_key_file)
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UserError("--tls-cert and --tls-key need each other")
    if args.uds is not None and (args.host is not None or args.port is not None):
        raise UserError("--uds listens on no port; leave out --host and --port")
    host, _ = address_of(args)
    uvicorn = need("uvicorn", "serve", "xverse serve")
    need("fastapi", "serve", "xverse serve")
    need("prometheus_client", "serve", "xverse serve")
    need("llguidance", "serve", "xverse serve")
    need("python_multipart", "serve", "xverse serve")
    from starlette.middleware.cors import CORSMiddleware

    from xverse.hardware import share_arenas
    from xverse.log import notice
    from xverse.serve.access_log import AccessLog
    from xverse.serve.app import create_app
    from xverse.serve.connections import protocol
    from xverse.serve.file_store import MOST_BYTES
    from xverse.serve.guard import Guard
    from xverse.serve.server import Server, check_certificate
    from xverse.serve.start import describe, load_service

    share_arenas()
    if args.tls_cert is not None:
        check_certificate(args.tls_cert, args.tls_key)
    page = None if args.page == "none" else args.page
    if args.uds is None and host not in LOOPBACK and not keys:
        notice(
            f"serve: {host} is reachable from other machines without an API key; set one with --api-key-file"
        )
    if hasattr(signal, "SIGHUP") and not os.isatty(0):  # not to end here; announce reads the keys again
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    with _listener(args) as listener:
        settings = service_settings(args, sampling)
        service = load_service(settings)
        root = args.root_path or ""
        app: Any = Guard(
            create_app(service, page, root),
            hosts=allowed_hosts("0.0.0.0" if args.uds else host, args.allowed_host or []),
            keys=keys,
            max_body=int(args.max_body_mb * 1e6),
            max_upload=MOST_BYTES if service.batches else None,
            origins=args.allowed_origin or [],
        )
        if args.allowed_origin:  # outside the guard: preflight requests carry no key
            app = CORSMiddleware(
                app, allow_origins=args.allowed_origin, allow_methods=["GET", "POST"], allow_headers=["*"]
            )
        app = AccessLog(
            app, service.metrics, log=not args.no_access_log, contents=args.log_contents, root=root
        )
        proxies = args.trusted_proxy or ["127.0.0.1", "::1"]
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            http=protocol(),
            forwarded_allow_ips="*" if args.uds else proxies,
            ssl_certfile=args.tls_cert,
            ssl_keyfile=args.tls_key,
        )
        address = _address(args, listener)

        def announce() -> None:
            with contextlib.suppress(UserError):
                reload()
            for line in [*describe(service, settings), f"page: {address + '/' if page else 'none'}"]:
                notice(f"serve: {line}")
            print(f"serving {service.name} at {address}", flush=True)

        def reload() -> None:
            keys[:] = read_keys(args.api_key_file)

        server = Server(config, service.runner, announce=announce, reload=reload, timeout=args.timeout)

        def die() -> None:
            server.should_exit = True

        service.runner.on_death = die
        # uvicorn finishes running requests and then raises the signal again for the previous handler.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        # Python gives signals their default effect while it ends, which would be to kill the process.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        server.run(sockets=[listener])
    if service.runner.dead:
        print(f"xverse: the engine died: {service.runner.dead}", file=sys.stderr)
        return 1
    return 130 if server.forced else 0


def address_of(args: argparse.Namespace) -> tuple[str, int]:
    """Host and port of the flags, without --uds."""
    return args.host or HOST, PORT if args.port is None else args.port


@contextlib.contextmanager
def _listener(args: argparse.Namespace) -> Iterator[socket.socket]:
    """The socket of the flags, bound before the model is loaded."""
    from xverse.serve.server import bind, bind_unix

    if args.uds is None:
        with bind(*address_of(args)) as listener:
            yield listener
        return
    path = Path(args.uds).expanduser()
    with bind_unix(path) as listener:
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _address(args: argparse.Namespace, listener: socket.socket) -> str:
    if args.uds is not None:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'http' if args.tls_cert is None else 'https'}://{shown}:{port}{args.root_path or ''}"


def allowed_hosts(host: str, more: list[str]) -> list[str] | None:
    """Host names that requests may use; None: any, also when listening on all addresses without ``more``."""
    if "*" in more or (host in ("0.0.0.0", "::") and not more):
        return None
    return [*LOOPBACK, host, *more]


def _origin(text: str) -> str:
    try:
        parts = urllib.parse.urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        valid = False
    if not valid or f"{parts.scheme}://{parts.netloc}".lower() != text.lower():
        raise argparse.ArgumentTypeError(
            f"{values.short(text)} is not an origin; write https://example.org, without a path"
        )
    return text.lower()


def _count(text: str) -> int:
    return values.whole(1, 100_000)(text)
