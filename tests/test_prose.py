"""Limits that keep the code readable: turns of phrase that editing removed, and the size of files."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# CONTRIBUTING.md gives better ones under "Writing".
PHRASES = re.compile(r" is no [a-z]| stands | told | is said")
ALLOWED = re.compile(r"[Tt]here is no | is no (longer|more|fewer|faster|slower) | stands for\b| told apart\b")
LOG = "docs/LOG.md"  # records what was tried in the words of its day


def texts() -> list[Path]:
    pages = [
        *(page for page in ROOT.glob("*.md") if page.name != "CONTRIBUTING.md"),  # which quotes them
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "benchmarks").rglob("*.md")),
    ]
    code = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    return pages + code


def test_no_phrase_that_was_edited_out_comes_back() -> None:
    hits = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            entry = f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            if PHRASES.search(ALLOWED.sub("", line)) and not entry.startswith(LOG):
                hits.append(entry)
    assert not hits, "\n".join(hits)


def test_sizes_of_files() -> None:
    counts = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "src").rglob("*.py")
    }
    too_long = [f"{path.relative_to(ROOT)}: {count}" for path, count in counts.items() if count > 500]
    assert not too_long, too_long
    assert statistics.mean(counts.values()) <= 160
    # 35,000 with the features of version 0.1; what has been added since takes the rest.
    assert sum(counts.values()) <= 54_950
