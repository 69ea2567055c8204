"""The listening socket, TLS and signals of the server process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from xverse.config import UserError
from xverse.log import notice
from xverse.serve.connections import LoopErrors
from xverse.serve.runner import EngineRunner

STALLED_SECONDS = 60  # after which a client that reads nothing is disconnected
_FLUSH_SECONDS = 3.0  # for what was said to reach the clients


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which does not accept connections yet.

    An address in use is reported at once, and load balancers see no server until the model is loaded.
    Raises UserError if the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return _bound(family, address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
    except UnicodeError as error:
        raise UserError(f"--host: {host!r} is not a host name ({error})") from None


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    # Without SO_REUSEADDR another server that is loading its model is noticed; with it, closed connections of
    # an earlier server do not block the address. Server.startup sets it for connections, which inherit it.
    for reuse in (False, True):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
            listener.bind(address)
            return listener
        except OSError as error:
            listener.close()
            if reuse or error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError("unreachable")


def bind_unix(path: Path) -> socket.socket:
    """The same on a Unix socket. One that a dead server left behind is replaced."""
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise UserError(f"--uds: {path} exists and is not a socket; name another path")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and _abandoned(path):
            path.unlink()
        listener.bind(str(path))
        return listener
    except OSError as error:
        listener.close()
        raise UserError(f"--uds: cannot listen on {path}: {error.strerror or error}") from None


def _abandoned(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
    return False


def check_certificate(certificate: str, key: str) -> None:
    """Raises UserError if uvicorn could not use these files."""
    for flag, file in (("--tls-cert", certificate), ("--tls-key", key)):
        if not Path(file).is_file() or not os.access(file, os.R_OK):
            raise UserError(f"{flag}: {file!r} is not a readable file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"--tls-cert, --tls-key: not a certificate and its unencrypted key in PEM ({reason})"
        ) from None


class Server(uvicorn.Server):
    """uvicorn that reports its address and, at the end, what it waits for, and that reloads on SIGHUP.

    ``reload`` reads the keys again; it may raise UserError.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        runner: EngineRunner,
        *,
        announce: Callable[[], None],
        reload: Callable[[], None],
        timeout: float,
    ) -> None:
        super().__init__(config)
        self._runner, self._announce, self._reload, self._timeout = runner, announce, reload, timeout
        self.forced = False  # whether a second Ctrl-C ended it
        self._terminal = _has_terminal()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or []:
            if listener.family != socket.AF_UNIX:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await super().startup(sockets)
        if self.started:
            self._loop = asyncio.get_running_loop()
            gc.freeze()  # reading a large body triggers collections, which would look at the model's objects
            self._loop.set_exception_handler(LoopErrors())
            if hasattr(signal, "SIGHUP"):
                self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
            self._announce()

    def _on_hangup(self) -> None:
        if self._terminal and not _has_terminal():  # the window was closed
            os.kill(os.getpid(), signal.SIGTERM)
            return
        try:
            if self.config.ssl is not None:
                certificate, key = str(self.config.ssl_certfile), str(self.config.ssl_keyfile)
                check_certificate(certificate, key)
                self.config.ssl.load_cert_chain(certificate, key)
            self._reload()
        except UserError as error:
            notice(f"serve: SIGHUP: {error}; the former ones stay in use")
        else:
            notice("serve: SIGHUP: keys and certificate were read again")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._runner.draining = True
        if self._loop is not None and not self.should_exit:
            self._loop.call_soon_threadsafe(self._say_what_runs)  # not here, in the midst of another print
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running replies, at most ``timeout`` seconds; nothing else delays the end.

        uvicorn would also wait for requests of which a part has not arrived, and for responses without end.
        """
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        connections = self.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        end = time.monotonic() + self._timeout
        await self._until(lambda: not self._runner.open, end)
        running = self._runner.open
        await self._until(lambda: not self.server_state.tasks, time.monotonic() + _FLUSH_SECONDS)
        for connection in list(connections):  # their tasks end as if the clients had left
            if running:
                connection.transport.abort()
            elif not connection.transport.is_closing():  # with TLS a second close would prevent abort
                connection.transport.close()
        self.force_exit, self.forced = False, self.force_exit
        await self._until(lambda: not connections, time.monotonic() + 1)
        for connection in list(connections):
            connection.transport.abort()
        await self._until(lambda: not self.server_state.tasks, time.monotonic() + 1)
        with contextlib.suppress(TimeoutError):  # it waits for the engine, which may be stuck
            await asyncio.wait_for(self.lifespan.shutdown(), _FLUSH_SECONDS)
        if running:
            why = "the second Ctrl-C" if self.forced else f"{self._timeout:g} s"
            cut = "1 reply was" if running == 1 else f"{running} replies were"
            notice(f"serve: ended after {why}; {cut} cut off")

    async def _until(self, condition: Callable[[], bool], end: float) -> None:
        while not condition() and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)

    def _say_what_runs(self) -> None:
        if self._runner.open:
            replies = "1 running reply" if self._runner.open == 1 else f"{self._runner.open} running replies"
            notice(f"serve: waiting for {replies}, at most {self._timeout:g} s; Ctrl-C again ends at once")


def _has_terminal() -> bool:
    with contextlib.suppress(OSError, ValueError):
        return os.isatty(0)
    return False
