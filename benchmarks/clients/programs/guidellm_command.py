"""guidellm: a synchronous run of a few requests, all of which must succeed."""

import json
import os
from pathlib import Path

from cases import URL, case, command, run


@case
def measures():
    report = Path.home() / "report.json"
    report.unlink(missing_ok=True)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(20)))
    command(
        *("guidellm", "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={URL.removesuffix('/v1')},model=nano"),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"),
        *("--data", "kind=json_file,path=prompts.jsonl"),
        *("--tokenizer", f"kind=hf_auto,model={os.environ['XVERSE_TOKENIZER']}"),
        *("--output", f"kind=json,path={report}"),
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0), totals


run()
