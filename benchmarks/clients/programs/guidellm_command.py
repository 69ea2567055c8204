"""guidellm: a synchronous run of a few requests, all of which must succeed."""

import json
import os
from pathlib import Path

from cases import URL, case, command, run


@case
def measures():
    report = Path.home() / "report.json"
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(20)))
    command(
        *("guidellm", "benchmark", "run", "--target", URL.removesuffix("/v1"), "--model", "nano"),
        *(
            "--processor",
            os.environ["XVERSE_TOKENIZER"],
            "--profile",
            "synchronous",
            "--max-requests",
            "4",
            "--data",
            "prompts.jsonl",
        ),
        *("--output-path", str(report)),
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0), totals


run()
