"""An evaluation's folder: one file of answers for each subject, so that a killed run goes on where it stood.

``settings.json`` says what was asked of which model; a run under other settings does not go on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.eval.scoring import Answered
from xverse.files import atomic_file


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or go on in it. Raises UserError where it holds an evaluation with other settings."""
    path = out / "settings.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
        if different:
            name = different[0]
            raise UserError(
                f"{out}: holds an evaluation with another {name} ({found.get(name)!r}, now "
                f"{settings.get(name)!r}); name another --out"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def settings(out: Path) -> dict[str, Any]:
    """Raises UserError where there is no evaluation."""
    try:
        found: dict[str, Any] = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{out}: no evaluation here (settings.json: {error.strerror})") from None
    except ValueError:
        raise UserError(f"{out}: its settings.json is no JSON") from None
    return found


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def path_of(out: Path, task: str, subject: str) -> Path:
    return out / "answers" / task / f"{subject}.jsonl"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All of a subject or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def row(task: str, subject: str, answered: Answered) -> dict[str, Any]:
    """As it stands in the files and in report.json: one log-probability for each letter."""
    question = answered.question
    assert all(math.isfinite(value) for value in answered.logprobs), question.id
    return {
        "task": task,
        "subject": subject,
        "id": question.id,
        "prompt": answered.prompt,
        "shots": answered.shots,
        "tokens": answered.tokens,
        "prediction": answered.prediction,
        "answer": question.answer,
        "logprobs": dict(zip(question.letters, answered.logprobs, strict=True)),
    }
