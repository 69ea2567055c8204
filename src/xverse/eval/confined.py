"""The script that ``sandbox.py`` starts: it confines itself, reports that, and runs a program.

``python -I -S confined.py PROGRAM SECONDS MEMORY``; it imports nothing from xverse.
"""

import ctypes
import os
import resource
import signal
import sys

READY = "confined"
_NEW_USER, _NEW_PROCESSES, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_DIE_WITH_PARENT = 1
_FILE_BYTES = 1 << 24
_PROCESSES = 64


def main() -> None:
    path, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_NEW_USER | _NEW_PROCESSES | _NEW_NETWORK):
        sys.exit(f"unshare: {os.strerror(ctypes.get_errno())}")
    child = os.fork()  # process 1 of its namespace: it sees only its descendants, which die with it
    if child:
        _, status = os.waitpid(child, 0)
        sys.exit(0 if status == 0 else 1)
    library.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib is not loaded here
        program = file.read()
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    print(READY, flush=True)
    sys.argv = ["program"]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})


main()
