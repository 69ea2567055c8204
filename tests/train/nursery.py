"""Starts torchrun by forking a process that has imported everything: importing torch anew in each of the
many processes of these tests would take minutes. What is started is torchrun's own code and real processes.

Reads JSON lines on stdin and answers each with one: {"start": torchrun's arguments, "log": file,
"environment": {}} with the process id, {"poll": id} with the exit code or null.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

PRELOAD = (
    "xverse.cli", "xverse.commands.pretrain", "xverse.train", "xverse.formats.write", "torch._dynamo",
    "torch.distributed.run", "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "matplotlib.backends.backend_agg", "matplotlib.figure",
)  # fmt: skip


def child(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 0
    try:
        importlib.import_module("torch.distributed.run").main(arguments)
    except BaseException as error:  # torchrun says what failed; a mistake of the test's is to be seen too
        code = 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            pid = os.fork()
            if pid == 0:
                child(asked["start"], asked["log"], asked["environment"])
            print(json.dumps(pid), flush=True)
            continue
        pid = asked["poll"]
        if pid not in ended:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps(ended.get(pid)), flush=True)


if __name__ == "__main__":
    main()
