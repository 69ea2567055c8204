"""The examples of docs/inference.md run."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"


def test_the_examples_run() -> None:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) >= 4
    names: dict[str, object] = {}
    for text in found:
        exec(compile(text, str(PAGE), "exec"), names)
    replies = names["replies"]
    assert isinstance(replies, dict)
    assert len(set(replies.values())) == 1  # greedy, three times the same
    assert all(replies.values())
    logprobs = names["logprobs"]
    assert isinstance(logprobs, list)
    assert all(value < 0 for each in logprobs for value in each)
