"""aider: one request in a repository. nano does not edit code; the request must be answered."""

import json
import os
import re
from pathlib import Path

from cases import URL, case, command, run

folder = Path.home() / "project"
folder.mkdir(exist_ok=True)
os.environ |= {"OPENAI_API_BASE": URL, "OPENAI_API_KEY": "none", "AIDER_ANALYTICS": "false"}
# Without an entry of its own for a model aider downloads a list of prices, and reports an error if it cannot.
MODEL = {"openai/nano": {"max_input_tokens": 8192, "litellm_provider": "openai", "mode": "chat"}}


@case
def turns():
    Path(folder / "a.py").write_text("print(1)\n")
    Path(folder / "models.json").write_text(json.dumps(MODEL))
    if not (folder / ".git").exists():
        command("git", "init", "-q", str(folder))
    options = ("--model", "openai/nano", "--no-show-model-warnings", "--yes-always", "--no-check-update")
    quiet = (
        *("--model-metadata-file", "models.json", "--no-show-release-notes", "--no-gitignore", "--no-pretty"),
        *("--map-tokens", "0", "--edit-format", "ask", "--no-auto-commits"),
    )
    said = command("aider", *options, *quiet, "--message", "What does a.py do?", "a.py", cwd=folder)
    # aider exits with 0 whatever the answer is; an answer other than 200 is one of litellm's errors.
    assert "Error" not in said, said[-300:]
    assert re.search(r"sent, [1-9][0-9.k]* received", said), said[-300:]


run()
