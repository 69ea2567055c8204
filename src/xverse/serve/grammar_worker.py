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
from collections.abc import Iterator
from typing import Any

import llguidance

from xverse.hardware import peak_memory, process_memory
from xverse.serve import json_bounds

COMPILE_SECONDS = 3.0  # of processor time
STEP_SECONDS = 0.25  # of processor time, for one mask
MEMORY = 256 * 2**20  # bytes beyond the vocabulary

COMMAND = struct.Struct("<cQ")  # FORK (with a socket) or KILL, and the number of the child
FORK, KILL = b"F", b"K"
LENGTH = struct.Struct("<I")  # of a grammar and of an answer
JSON, TEXT = b"J", b"T"  # before a grammar: what its replies are
STEP = struct.Struct("<Qi")  # a reply's number and its next token, or START or END
START, END = -1, -2
ANSWER = struct.Struct("<QBII")  # the reply's number, OK or FAILED, counts of forced tokens and of mask bytes
OK, FAILED = 0, 1


def main() -> None:
    """Fork on command until the server is gone. Arguments: file descriptors of the command socket and of the
    pickled tokenizer and end ids."""
    # Sent to the whole group, but the server needs this process until its end.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    with os.fdopen(int(sys.argv[2]), "rb") as file:
        vocabulary = Vocabulary(*pickle.load(file))
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


class Vocabulary:
    """A tokenizer as llguidance and as ``json_bounds`` read it."""

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
        adapter = _TokenizerAdapter(tokenizer, stop_ids)
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(adapter))
        self.tokens = json_bounds.Tokens(adapter.tokens)


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


def _serve(connection: socket.socket, vocabulary: Vocabulary) -> None:
    """Compile the grammar that arrives, then answer steps. Never returns."""
    with contextlib.suppress(BaseException):
        # Rust reports a failed allocation here; the server reports it to the client.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _answer(connection, vocabulary)
    os._exit(0)


def _answer(connection: socket.socket, vocabulary: Vocabulary) -> None:
    _limit_memory()
    before = peak_memory()
    (length,) = LENGTH.unpack(receive(connection, LENGTH.size))
    grammar = receive(connection, length)
    is_json, grammar = grammar[:1] == JSON, grammar[1:]
    with _at_most(COMPILE_SECONDS):
        # The first mask belongs to it: part of the work is deferred until then.
        compiled = llguidance.LLMatcher(vocabulary.tokenizer, grammar.decode(), log_level=0, limits=limits())
        if not compiled.is_error():
            first = compiled.deep_copy()
            first.compute_bitmask()
            compiled = first if first.is_error() else compiled
    reason = _reason(compiled) if compiled.is_error() else ""
    text = f"{peak_memory() - before} {reason}".encode()
    connection.sendall(LENGTH.pack(len(text)) + text)
    if reason:
        return
    replies: dict[int, _Reply] = {}
    while True:
        number, token = STEP.unpack(receive(connection, STEP.size))
        if token == END:
            replies.pop(number, None)
            continue
        with _at_most(STEP_SECONDS):
            if token == START:
                written = json_bounds.Written(vocabulary.tokens) if is_json else None
                replies[number] = _Reply(compiled.deep_copy(), written)
            else:
                replies[number].add(token)
            answer = replies[number].state(number)
        connection.sendall(answer)


class _Reply:
    """A matcher, and for JSON the text so far."""

    def __init__(self, matcher: llguidance.LLMatcher, written: json_bounds.Written | None) -> None:
        self._matcher, self._written = matcher, written

    def add(self, token: int) -> None:
        if self._matcher.consume_token(token) and self._written is not None:
            self._written.add(token)

    def state(self, number: int) -> bytes:
        """The forced tokens (int32) and the mask (bits; none: only an end id is allowed), or the error."""
        matcher, mask, forced = self._matcher, b"", []
        if not matcher.is_error() and not matcher.is_stopped():
            mask = bytes(matcher.compute_bitmask())
            if self._written is not None:
                mask = self._written.bounded(mask)
            forced = matcher.compute_ff_tokens()
        if matcher.is_error():
            text = _reason(matcher).encode()
            return ANSWER.pack(number, FAILED, 0, len(text)) + text
        head = ANSWER.pack(number, OK, len(forced), len(mask))
        return head + struct.pack(f"<{len(forced)}i", *forced) + mask


def _reason(matcher: llguidance.LLMatcher) -> str:
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:300]
    if "too many" in text:
        text = f"it takes too much work ({text}); use smaller counts and fewer combined patterns"
    return "no text matches it" if text.startswith("NoExtension") else text


def limits() -> llguidance.LLParserLimits:
    """llguidance's own limits end most expensive grammars, with a reason; the kernel's end the others."""
    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """End the process after ``seconds`` of its processor time, wherever it is."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if size := process_memory("VmSize"):  # None on macOS, which has no such limit either
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


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
