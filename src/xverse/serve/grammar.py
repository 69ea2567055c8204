"""Constrained output: JSON schemas and tool calls, enforced token by token with llguidance.

Other processes do the work (``grammar_worker.py``): a schema of 100 bytes can take any time and memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from xverse.serve import grammar_worker as worker
from xverse.serve import schemas, tools
from xverse.serve.errors import ApiError
from xverse.serve.protocol import ChatRequest, Generation
from xverse.serve.structures import Structure
from xverse.tokenizer import Tokenizer

COMPILING = 4  # grammars at once; the system gives the engine's thread priority
WAITING = 64  # further ones
COMPILE_WAIT = 120.0  # seconds until a compilation ends, on a machine with other work
STEP_WAIT = 5.0  # the same for a mask
KEPT = 16  # compiled grammars that are not in use
KEPT_BYTES = 32 * 2**20  # of memory for each of them
MOST = 128  # compiled grammars
REFUSALS = 256  # that are remembered

_TOO_MUCH = (
    f"it takes too long or too much memory to compile (the limits are {worker.COMPILE_SECONDS:g} s and "
    f"{worker.MEMORY >> 20} MB); large multiples, counts and combined patterns are expensive"
)


class Source(NamedTuple):
    """A grammar before it is compiled, the field of the request that it comes from, and whether its replies
    are JSON, to which further bounds apply (``json_bounds.py``)."""

    grammar: str
    param: str
    json: bool = True

    @property
    def key(self) -> bytes:
        return (worker.JSON if self.json else worker.TEXT) + self.grammar.encode()


class Grammars:
    """Compiles the grammars of requests; one object per server. Belongs to one event loop."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._processes: _Processes | None = None
        self._starting = asyncio.Lock()
        self._slots = asyncio.Semaphore(COMPILING)
        self._waiting = 0
        self._kept: OrderedDict[bytes, Compiled] = OrderedDict()
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        self._alive: weakref.WeakSet[Compiled] = weakref.WeakSet()
        self._running: dict[bytes, _Shared] = {}

    async def of(self, body: Generation) -> Compiled | None:
        """The grammar of a reply, or None if it is not constrained. Raises ApiError for a schema that is too
        large, is not supported or does not compile within the limits. Cancelling ends the compilation."""
        if body.structure() is None and not (isinstance(body, ChatRequest) and body.must_call):
            return None
        source = await asyncio.to_thread(source_of, body)
        return None if source is None else await self.compiled(source)

    async def compiled(self, source: Source) -> Compiled:
        """The grammar, compiled now or before. Raises ApiError."""
        key = source.key
        kept = self._kept.get(key)
        if kept is not None and not kept.failed:
            self._kept.move_to_end(key)
            return kept
        if key not in self._refused:
            shared = self._running.get(key)
            if shared is None:
                shared = self._running[key] = _Shared(
                    self._compile(key), lambda: self._running.pop(key, None)
                )
            result = await shared.result()
            if isinstance(result, Compiled):
                return result
            self._refused[key] = result
            if len(self._refused) > REFUSALS:
                self._refused.popitem(last=False)
        raise unsupported(source.param, source.json, self._refused[key])

    def start(self, compiled: Compiled, body: Generation) -> Grammar:
        """The constraint of a reply to ``body``, which asks for the grammar."""
        return Grammar(compiled, self._tokenizer.vocab_size, self._stop_ids, _origin(body, body.structure()))

    async def _compile(self, grammar: bytes) -> Compiled | str:
        """The compiled grammar, or why it does not compile."""
        if self._waiting >= WAITING or len(self._alive) >= MOST:
            raise ApiError(503, "too many schemas are being compiled; try again later", code="queue_full")
        self._waiting += 1
        try:
            async with self._slots:
                processes = await self._started()
                compiled = Compiled(processes)
                self._alive.add(compiled)
                reason = await compiled.compile(grammar)
        finally:
            self._waiting -= 1
        if reason:
            return reason
        if compiled.memory <= KEPT_BYTES:
            self._kept[grammar] = compiled
            if len(self._kept) > KEPT:  # a reply that uses it keeps it alive
                self._kept.popitem(last=False)
        return compiled

    async def _started(self) -> _Processes:
        async with self._starting:
            if self._processes is None or self._processes.ended():
                self._processes = await asyncio.to_thread(_Processes, self._tokenizer, self._stop_ids)
            return self._processes


def source_of(body: Generation) -> Source | None:
    """The grammar that a request asks for. Raises ApiError."""
    structure = body.structure()
    make: Callable[[], str]
    if isinstance(body, ChatRequest) and body.must_call:
        make = functools.partial(schemas.call_grammar, tools.offered_tools(body))
    elif structure is None:
        return None
    else:
        make = functools.partial(schemas.of_structure, structure)
    param, is_json = _origin(body, structure)
    try:
        return Source(make(), param, is_json)
    except schemas.TooLarge as error:
        raise ApiError(400, f"{param}: {error}", code="schema_too_large") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise unsupported(param, is_json, reason) from None


def _origin(body: Generation, structure: Structure | None) -> tuple[str, bool]:
    """The field that asks for a grammar, and whether its replies are JSON."""
    if structure is None or (isinstance(body, ChatRequest) and body.must_call):
        return "tools", True
    return structure.param, structure.kind in ("json_schema", "json_object")


def unsupported(param: str, is_json: bool, reason: str) -> ApiError:
    kind = "schema" if is_json else "grammar"
    return ApiError(400, f"{param}: the {kind} is not supported: {reason}", code="bad_schema")


class _Shared:
    """Work that several wait for; it is cancelled when the last of them is."""

    def __init__(self, work: Awaitable[Compiled | str], done: Callable[[], object]) -> None:
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(lambda task: done())
        self._waiting = 0

    async def result(self) -> Compiled | str:
        self._waiting += 1
        try:
            return await asyncio.shield(self._task)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._task.cancel()


class _Processes:
    """The process that holds the vocabulary and forks for each grammar. Blocks while it starts."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self._numbers = itertools.count()
        self._control, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs, tempfile.TemporaryFile() as file:
            pickle.dump((tokenizer, stop_ids), file)
            file.seek(0)
            descriptors = (theirs.fileno(), file.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", worker.__name__, *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
                pass_fds=descriptors,
            )
        weakref.finalize(self, _end, self._control, self._process)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def fork(self) -> tuple[int, socket.socket]:
        """The number of a new child, and its socket. Raises OSError if the process has ended."""
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [worker.COMMAND.pack(worker.FORK, number)], [theirs.fileno()])
        return number, ours

    def kill(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(worker.COMMAND.pack(worker.KILL, number))


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()
    process.wait()


class Compiled:
    """A grammar in a process of its own, which ends when nothing refers to this object."""

    def __init__(self, processes: _Processes) -> None:
        self.failed = ""  # why the process ended
        self.memory = 0  # bytes that compiling took
        number, self._connection = processes.fork()
        self._kill = weakref.finalize(self, _end_child, processes, number, self._connection)
        self._numbers = itertools.count()
        self._ended: deque[int] = deque()  # replies whose state is not needed any more
        self._answers: dict[int, _Answer] = {}
        self._sending = threading.Lock()

    async def compile(self, grammar: bytes) -> str:
        """Why it does not compile; empty if it does. Cancelling ends the process."""
        loop, connection = asyncio.get_running_loop(), self._connection
        connection.setblocking(False)
        answer = bytearray()
        try:
            async with asyncio.timeout(COMPILE_WAIT):
                await loop.sock_sendall(connection, worker.LENGTH.pack(len(grammar)) + grammar)
                size = worker.LENGTH.size
                while len(answer) < size:
                    part = await loop.sock_recv(connection, size - len(answer))
                    if not part:
                        return _TOO_MUCH
                    answer += part
                    if len(answer) == worker.LENGTH.size == size:
                        size += worker.LENGTH.unpack(answer)[0]
        except TimeoutError:
            raise ApiError(503, "the server is too busy to compile the schema", code="queue_full") from None
        except ConnectionError:
            return _TOO_MUCH
        finally:
            if not answer:
                self._kill()
        memory, _, reason = answer[worker.LENGTH.size :].decode().partition(" ")
        self.memory = int(memory)
        connection.settimeout(STEP_WAIT)
        return reason

    def begin(self) -> int:
        """Begin a reply and return its number."""
        number = next(self._numbers)
        with contextlib.suppress(ValueError):  # ``answer`` reports it
            self.step(number, worker.START)
        return number

    def step(self, number: int, token: int) -> None:
        """Advance a reply by a token; ``answer`` returns its state then."""
        with self._sending, self._watched():
            data = b""
            while self._ended:
                data += worker.STEP.pack(self._ended.popleft(), worker.END)
            self._connection.sendall(data + worker.STEP.pack(number, token))

    def answer(self, number: int) -> _Answer:
        """The state of a reply. The answers to others that arrive meanwhile are kept."""
        while number not in self._answers:
            with self._watched():
                head = worker.receive(self._connection, worker.ANSWER.size)
                other, status, forced, size = worker.ANSWER.unpack(head)
                data = worker.receive(self._connection, 4 * forced + size)
            self._answers[other] = _Answer(
                error=data.decode() if status == worker.FAILED else "",
                forced=list(struct.unpack_from(f"<{forced}i", data)),
                mask=data[4 * forced :],
            )
        return self._answers.pop(number)

    def end(self, number: int) -> None:
        """Release the state of a reply. May be called from any thread."""
        self._ended.append(number)
        self._answers.pop(number, None)

    @contextlib.contextmanager
    def _watched(self) -> Any:
        """Raises ValueError if the process ends or does not answer in time."""
        if self.failed:
            raise ValueError(self.failed)
        try:
            yield
        except (OSError, EOFError):  # TimeoutError is an OSError
            self.failed = "computing which tokens it allows takes too long or too much memory"
            self._kill()
            raise ValueError(self.failed) from None


def _end_child(processes: _Processes, number: int, connection: socket.socket) -> None:
    connection.close()
    processes.kill(number)


class _Answer(NamedTuple):
    error: str
    forced: list[int]  # the tokens that come next if the text is determined
    mask: bytes  # one bit per token; empty: the text is complete


class Grammar:
    """The constraint of one reply; implements ``engine.Constraint``. Masks are computed beside the engine."""

    def __init__(
        self, compiled: Compiled, vocab_size: int, stop_ids: tuple[int, ...], origin: tuple[str, bool]
    ) -> None:
        self.failed = ""  # the reason: a schema can compile and still exceed the work limit of a step
        self.origin = origin  # the field that asks for it, and whether the text is JSON
        self._compiled = compiled
        self._size = vocab_size
        self._stop_ids = [token for token in stop_ids if token < vocab_size]
        self._number = compiled.begin()
        self._state: _Answer | None = None  # None: not received
        weakref.finalize(self, compiled.end, self._number)

    def allowed(self) -> Tensor:
        """The tokens that the grammar allows here, bool [V]."""
        mask = self._answer().mask
        if mask:
            bits = torch.frombuffer(bytearray(mask), dtype=torch.uint8)  # 8 tokens each, lowest bit first
            shifts = torch.arange(8, dtype=torch.uint8)
            return (bits[:, None] >> shifts & 1).bool().flatten()[: self._size]
        allowed = torch.zeros(self._size, dtype=torch.bool)
        allowed[self._stop_ids] = True
        return allowed

    def accept(self, token_id: int) -> None:
        if token_id in self._stop_ids:  # the mask allows it only where the text is complete
            return
        self._answer()
        self._state = None
        self._working(lambda: self._compiled.step(self._number, token_id))

    def forced(self) -> list[int]:
        """The tokens that follow if the text is determined here."""
        return self._answer().forced

    def _answer(self) -> _Answer:
        if self._state is None:
            self._state = self._working(lambda: self._compiled.answer(self._number))
        if self._state.error:
            self._fail(self._state.error)
        return self._state

    def _working(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ValueError as error:
            self._fail(str(error))

    def _fail(self, reason: str) -> NoReturn:
        self.failed = reason
        raise ValueError(f"the grammar failed: {reason}")
