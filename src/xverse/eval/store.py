"""An evaluation's folder: one file of answers for each subject, so that a killed run resumes there.

``settings.json`` records model, tasks and settings; a run with other settings is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.eval.scoring import Answer
from xverse.files import atomic_file, write_json
from xverse.texts import read_jsonl, read_object


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Create the folder or resume in it. Raises UserError if it holds an evaluation with other settings."""
    path = out / "settings.json"
    if path.exists():
        stored = read_object(path)
        different = sorted(key for key in {*stored, *settings} if stored.get(key) != settings.get(key))
        if different:
            name = different[0]
            raise UserError(
                f"{out}: holds an evaluation with another {name} ({stored.get(name)!r}, now "
                f"{settings.get(name)!r}); name another --out"
            )
        return
    write_json(path, settings)


def settings(out: Path) -> dict[str, Any]:
    """The settings of an evaluation. Raises UserError where there is none."""
    path = out / "settings.json"
    values = read_object(path) if path.exists() else {}
    if not isinstance(values.get("model"), str):
        raise UserError(f"{out}: no evaluation here (no settings.json that names a model)")
    return values


def path_of(out: Path, task: str, subject: str) -> Path:
    return out / "answers" / task / f"{subject}.jsonl"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all answers of a subject, atomically."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The answers of a subject."""
    return [row for _, row in read_jsonl(path)]


def row(task: str, subject: str, answer: Answer) -> dict[str, Any]:
    """An answer as it is stored here and in report.json, with one log-probability for each letter."""
    question = answer.question
    assert all(math.isfinite(value) for value in answer.logprobs), question.id
    return {
        "task": task,
        "subject": subject,
        "id": question.id,
        "prompt": answer.prompt.prompt,
        "shots": answer.prompt.shots,
        "tokens": len(answer.prompt.ids),
        "prediction": answer.prediction,
        "answer": question.answer,
        "logprobs": dict(zip(question.letters, answer.logprobs, strict=True)),
    }
