"""The processes in which grammars are compiled and masks computed, because both can take any time and memory.

The server starts one process that loads the vocabulary (``main``) and forks for each grammar, so that a
compilation does not load it again. Each child compiles one grammar and then answers for all replies that use
it. The kernel ends a child that exceeds its processor time (SIGPROF) or its memory (RLIMIT_AS); the server
sees the end of its socket. All of them end when the server does, because their sockets then end.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from typing import Any

COMPILE_SECONDS = 5.0  # of processor time
STEP_SECONDS = 0.25  # of processor time, for one mask
MEMORY = 256 * 2**20  # bytes beyond the vocabulary

COMMAND = struct.Struct("<cQ")  # FORK (with a socket) or KILL, and the number of the child
FORK, KILL = b"F", b"K"
LENGTH = struct.Struct("<I")  # of a grammar, and of an answer
STEP = struct.Struct("<Qi")  # a reply's number and its next token, or START or END
START, END = -1, -2
ANSWER = struct.Struct("<QBII")  # the reply's number, OK or FAILED, counts of forced tokens and of mask bytes
OK, FAILED = 0, 1


def main() -> None:
    """Fork on command until the server is gone. Arguments: file descriptors of the command socket and of the
    pickled tokenizer and end ids."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, but the server needs us to end
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    with os.fdopen(int(sys.argv[2]), "rb") as file:
        vocabulary = _vocabulary(*pickle.load(file))
    children: dict[int, int] = {}
    while True:
        command, sockets, _, _ = socket.recv_fds(control, COMMAND.size, 1)
        for number, child in list(children.items()):
            if os.waitpid(child, os.WNOHANG)[0]:
                del children[number]
        if len(command) < COMMAND.size:
            break
        kind, number = COMMAND.unpack(command)
        if kind == FORK:
            child = os.fork()
            if not child:
                control.close()
                _serve(socket.socket(fileno=sockets[0]), vocabulary)
            children[number] = child
            os.close(sockets[0])
        elif number in children:
            os.kill(children[number], signal.SIGKILL)
    for child in children.values():
        os.kill(child, signal.SIGKILL)


def _vocabulary(tokenizer: Any, stop_ids: tuple[int, ...]) -> Any:
    import llguidance

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_TokenizerAdapter(tokenizer, stop_ids)))


class _TokenizerAdapter:
    """The tokenizer interface that llguidance expects."""

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        ids: list[int] = self._tokenizer.encode(text)
        return ids


def _serve(connection: socket.socket, vocabulary: Any) -> None:
    """Compile the grammar that arrives, then answer steps. Never returns."""
    with contextlib.suppress(BaseException):
        # Rust reports a failed allocation here; the server reports it to the client.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _answer(connection, vocabulary)
    os._exit(0)


def _answer(connection: socket.socket, vocabulary: Any) -> None:
    import llguidance

    _limit_memory()
    before = _peak_memory()
    (length,) = LENGTH.unpack(receive(connection, LENGTH.size))
    grammar = receive(connection, length).decode()
    with _at_most(COMPILE_SECONDS):
        # The first mask belongs to it: part of the work is deferred until then.
        compiled = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=_limits())
        if not compiled.is_error():
            compiled.deep_copy().compute_bitmask()
    reason = compiled.get_error() if compiled.is_error() else ""
    text = f"{_peak_memory() - before} {' '.join(reason.split())[:300]}".encode()
    connection.sendall(LENGTH.pack(len(text)) + text)
    if reason:
        return
    replies: dict[int, Any] = {}
    while True:
        number, token = STEP.unpack(receive(connection, STEP.size))
        if token == END:
            replies.pop(number, None)
            continue
        with _at_most(STEP_SECONDS):
            if token == START:
                replies[number] = compiled.deep_copy()
            else:
                replies[number].consume_token(token)
            answer = _state(number, replies[number])
        connection.sendall(answer)


def _state(number: int, matcher: Any) -> bytes:
    """The forced tokens (int32) and the mask (bits; none: only an end id is allowed), or the error."""
    if matcher.is_error():
        text = " ".join(matcher.get_error().split())[:300].encode()
        return ANSWER.pack(number, FAILED, 0, len(text)) + text
    if matcher.is_stopped():
        return ANSWER.pack(number, OK, 0, 0)
    mask = bytes(matcher.compute_bitmask())
    forced = [] if matcher.is_error() else matcher.compute_ff_tokens()
    if matcher.is_error():
        return _state(number, matcher)
    return ANSWER.pack(number, OK, len(forced), len(mask)) + struct.pack(f"<{len(forced)}i", *forced) + mask


def _limits() -> Any:
    """llguidance's own limits. They end most expensive grammars with a reason; the kernel's end the others."""
    import llguidance

    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


@contextlib.contextmanager
def _at_most(seconds: float) -> Any:
    """End the process after ``seconds`` of its processor time, wherever it is."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # macOS has no such limit
        size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def _peak_memory() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes. Raises EOFError if the other side has ended."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


if __name__ == "__main__":
    main()
