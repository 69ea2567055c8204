"""aider: one request in a repository. nano does not edit code; the request must be answered."""

import os
from pathlib import Path

from cases import URL, case, command, run

folder = Path.home() / "project"
folder.mkdir(exist_ok=True)
os.environ |= {"OPENAI_API_BASE": URL, "OPENAI_API_KEY": "none", "AIDER_ANALYTICS": "false"}


@case
def turns():
    Path(folder / "a.py").write_text("print(1)\n")
    if not (folder / ".git").exists():
        command("git", "init", "-q", str(folder))
    options = ("--model", "openai/nano", "--no-show-model-warnings", "--yes-always", "--no-check-update")
    quiet = (
        "--no-gitignore",
        "--no-pretty",
        "--map-tokens",
        "0",
        "--edit-format",
        "ask",
        "--no-auto-commits",
    )
    said = command("aider", *options, *quiet, "--message", "What does a.py do?", "a.py", cwd=folder)
    assert "Error" not in said, said[-300:]


run()
