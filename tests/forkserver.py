"""``Popen`` and ``run`` of ``subprocess`` for Python programs, without importing torch in each of them.

A server process imports torch, transformers and the command line once, which takes 10 to 20 CPU-seconds. For
each program it forks, and the fork runs the program as ``__main__`` with its own arguments, environment,
folder, streams and session. The fork then becomes a child of the calling process: its process id, signals,
exit status and resource usage are those of any child.

Parallel workers of pytest are such forks too (``Worker``), each with a server of its own.

A program gets an interpreter of its own where one is needed: off Linux, for interpreter options (``-X``,
``-W``), for a ``preexec_fn``, and if the environment differs in a variable that is read at start-up or on
import (``AT_START``). A test about start-up, imports or memory has to use ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import locale
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any

PRELOAD = (
    "torch._dynamo", "torch.distributed.run", "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "transformers.modeling_utils", "matplotlib.backends.backend_agg", "matplotlib.figure", "fastapi",
    "uvicorn", "xverse.cli", "xverse.commands.pretrain", "xverse.train", "xverse.formats.write",
    "xverse.engine.load", "xverse.serve.app", "xverse.serve.start", "transformers.trainer",
    "xverse.finetune.run",
)  # fmt: skip
AT_START = (
    "PYTHON", "LD_", "MKL_", "OPENBLAS_", "GOMP_", "MALLOC_", "TORCH_LOGS", "TORCHDYNAMO_", "TORCHINDUCTOR_",
    "PYTORCH_", "OMP_", "CUDA_", "HF_", "TRANSFORMERS_", "XVERSE_KERNELS",
)  # fmt: skip
# Torch sets the last one itself, when it compiles something.
FOLLOWED = ("PYTHONPATH", "OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR")
FIRST = ("-c", "-m", "-", "-u")  # options of Python that a fork honours, as its first
SET_CHILD_SUBREAPER = 36  # of prctl(2)
INHERITED = "XVERSE_TEST_FORKSERVER"
AT_IMPORT = dict(os.environ)  # before a test changes a variable
os.environ.pop(INHERITED, None)


class Server:
    """The process that forks, as one test process sees it."""

    def __init__(self) -> None:
        self.environment = at_start(AT_IMPORT)
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        if descriptor := AT_IMPORT.pop(INHERITED, ""):
            self.channel = socket.socket(fileno=int(descriptor))
            return
        self.channel, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        # What is printed by imports is of no interest unless they fail.
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self.output,
            stderr=self.output, env=AT_IMPORT,
        )  # fmt: skip
        theirs.close()

    def start(self, request: dict[str, Any], streams: list[int]) -> int:
        """The process id of a new child of this process."""
        data = json.dumps(request).encode()
        prctl = ctypes.CDLL(None).prctl
        with self.lock:
            prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # an orphan that the server leaves becomes our child
            try:
                socket.send_fds(self.channel, [len(data).to_bytes(8)], streams)
                self.channel.sendall(data)
                answer = receive(self.channel, 8)
            finally:
                prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert answer, f"the fork server has ended: {self.said()}"
        return int.from_bytes(answer)

    def said(self) -> str:
        if self.process is None:
            return ""
        self.output.seek(0)
        return self.output.read()


@functools.cache
def the_server() -> Server:
    return Server()


def at_start(environment: Any) -> dict[str, str]:
    """The variables that a running process no longer follows; a path can be added, and threads be set."""
    named = ((name, value) for name, value in environment.items() if name.startswith(AT_START))
    return {name: value for name, value in named if name not in FOLLOWED}


ORIGINAL = subprocess.Popen


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` of ``[sys.executable, …]``."""

    serves = ""  # what the program does with a fork server of its own, if it gets one

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any,
                       cwd: Any, env: Any, *rest: Any) -> None:  # fmt: skip
        _, _, shell, *pipes, _, gid, gids, uid, _, session, group = rest
        command = [os.fspath(word) for word in args]
        environment = {**(os.environ if env is None else env)}
        program = command[1] if len(command) > 1 else "-"
        plain = command[0] == sys.executable and (program in FIRST or not program.startswith("-"))
        unusual = executable or preexec_fn or pass_fds or shell or group >= 0
        unusual = unusual or (gid, gids, uid) != (None, None, None)
        fork = plain and not unusual and sys.platform == "linux"
        if not fork or at_start(environment) != the_server().environment:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)  # type: ignore[misc]
            return
        request = {
            "words": command[1:],
            "environment": environment,
            "cwd": str(Path(cwd or ".").absolute()),
            "session": session,
            "serves": self.serves,
        }
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = pipes
        streams = [theirs if theirs >= 0 else i for i, theirs in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = the_server().start(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


class Worker(Popen):
    """A worker of pytest-xdist: it starts with everything imported, and forks programs itself."""

    serves = "worker"


class Launcher(Popen):
    """A program whose own Python programs are forked too, such as a launcher of several processes."""

    serves = "launcher"


def run(
    command: Any,
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run`` of ``[sys.executable, …]``."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def receive(channel: socket.socket, length: int) -> bytes:
    """That many bytes, or none at the end."""
    data = b""
    while len(data) < length:
        more = channel.recv(length - len(data))
        if not more:
            return b""
        data += more
    return data


def next_program(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """In the server: fork for each request. Returns the request in the fork; the server never returns."""
    parent = os.getppid()
    answer, answers = os.pipe()
    while True:
        header, streams, _, _ = socket.recv_fds(channel, 8, 3)
        if not header:
            sys.exit()
        header += receive(channel, 8 - len(header))
        data = receive(channel, int.from_bytes(header))
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid == 0:
                while os.getppid() != parent:  # until the orphan has been adopted
                    os.sched_yield()
                channel.close()
                return json.loads(data), streams
            os.write(answers, pid.to_bytes(8))
            os._exit(0)
        for stream in streams:
            os.close(stream)
        os.waitpid(middle, 0)
        channel.sendall(os.read(answer, 8))


def opened(number: int, mode: str, like: Any, line_buffering: bool = False, direct: bool = False) -> Any:
    """A standard stream as Python opens it. The server's remembers whether its own file was seekable."""
    binary = io.open(number, f"{mode}b", closefd=False)  # noqa: SIM115, UP020
    return io.TextIOWrapper(
        binary, like.encoding, like.errors, newline="\n", line_buffering=line_buffering, write_through=direct
    )


def become(request: dict[str, Any], streams: list[int]) -> None:
    """In the fork: take the streams, environment, folder and session of the program."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    os.closerange(3, max(int(file.name) for file in Path("/proc/self/fd").iterdir()) + 1)
    if request["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")
    os.chdir(request["cwd"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path]
    unbuffered = request["words"][:1] == ["-u"]
    sys.stdin = sys.__stdin__ = opened(0, "r", sys.stdin)
    sys.stdout = sys.__stdout__ = opened(1, "w", sys.stdout, unbuffered or os.isatty(1), unbuffered)
    sys.stderr = sys.__stderr__ = opened(2, "w", sys.stderr, line_buffering=True)
    importlib.import_module("numpy").random.seed()
    if (threads := os.environ.get("OMP_NUM_THREADS")) != threads_of_server:
        torch = importlib.import_module("torch")
        torch.set_num_threads(int(threads) if threads else os.cpu_count())


def execute(words: list[str]) -> None:
    """What ``python WORDS`` does."""
    words = words[words[0] == "-u" :]  # which ``become`` has honoured
    kind, *arguments = words
    if kind == "-m":
        sys.argv, sys.path[0] = arguments, str(Path.cwd())
        sys.modules.pop(arguments[0], None)  # runpy warns of a module that is there already
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    folder = ""
    if kind == "-c":
        name, code, words = "<string>", arguments[0], ["-c", *arguments[1:]]
    elif kind == "-":
        name, code = "<stdin>", sys.stdin.read()
    else:
        name, code, folder = kind, Path(kind).read_text(encoding="utf-8"), str(Path(kind).resolve().parent)
        main.__dict__["__file__"] = kind
    sys.argv, sys.path[0] = words, folder
    sys.modules["__main__"] = main
    exec(compile(code, name, "exec"), main.__dict__)


def status_of(words: list[str]) -> int:
    """Execute a program to its end, as multiprocessing does: threads, exit handlers, and no tearing down of
    thousands of modules, each page of which would have to be copied first."""
    status, interrupted = 0, False
    try:
        execute(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        interrupted = True
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            output.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status & 0xFF


if __name__ == "__main__":
    threads_of_server = os.environ.get("OMP_NUM_THREADS")
    for module in PRELOAD:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page
    channel = socket.socket(fileno=int(sys.argv[1]))
    while True:
        program, streams = next_program(channel)
        become(program, streams)
        if not program["serves"]:
            break
        ours, channel = socket.socketpair()
        if os.fork():
            channel.close()
            if program["serves"] == "worker":
                os.environ[INHERITED] = str(ours.detach())  # for its own import of this file
                break
            AT_IMPORT = {**os.environ, INHERITED: str(ours.detach())}
            for imported in list(sys.modules.values()):
                if vars(imported).get("Popen") is ORIGINAL:
                    imported.Popen = Launcher  # type: ignore[attr-defined]
            break
        ours.close()
        with Path(os.devnull).open("r+b") as null:
            os.dup2(null.fileno(), 0)
            os.dup2(null.fileno(), 1)
    os._exit(status_of(program["words"]))
