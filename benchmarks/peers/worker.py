"""``worker.py ENGINE PATH WEIGHTS THREADS TOKENS``: the process of one engine.

Answers each line of JSON with one: {"do": "start", "prompts": …}, {"do": "decode", "steps": n},
{"do": "stop"}, {"do": "logits", "prompt": …}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    # Libraries print to stdout too; their output goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from xverse.hardware import process_memory

    kind, path, weights, threads, tokens = sys.argv[1:]
    from benchmarks.peers.engines import ENGINES, Runner

    engine: Runner = ENGINES[kind](path, weights, int(threads), int(tokens))

    def answer(reply: Any) -> None:
        print(json.dumps(reply), file=answers, flush=True)

    answer(
        {"weight_bytes": engine.weight_bytes, "position_bytes": engine.position_bytes, "notes": engine.notes}
    )
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            answer({"seconds": engine.start(order["prompts"])})
        elif order["do"] == "decode":
            answer({"seconds": engine.decode(order["steps"]), "resident": process_memory("VmRSS")})
        elif order["do"] == "logits":
            answer({"logits": engine.logits(order["prompt"])})
        else:
            engine.stop()
            answer({})


if __name__ == "__main__":
    main()
