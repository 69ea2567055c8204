"""An engine in a process of its own: ``worker.py ENGINE PATH WEIGHTS THREADS TOKENS``.

Then one JSON object a line, and one back: {"do": "start", "prompts": …}, {"do": "decode", "steps": n},
{"do": "stop"}, {"do": "logits", "prompt": …}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024


def main() -> None:
    # Whatever the libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, path, weights, threads, tokens = sys.argv[1:]
    from engines import ENGINES, Runner

    engine: Runner = ENGINES[kind](path, weights, int(threads), int(tokens))

    def answer(found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    answer(
        {
            "weight_bytes": engine.weight_bytes,
            "position_bytes": engine.position_bytes,
            "notes": engine.notes,
        }
    )
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            answer({"seconds": engine.start(order["prompts"])})
        elif order["do"] == "decode":
            answer({"seconds": engine.decode(order["steps"]), "resident": resident()})
        elif order["do"] == "logits":
            answer({"logits": engine.logits(order["prompt"])})
        else:
            engine.stop()
            answer({})


if __name__ == "__main__":
    main()
