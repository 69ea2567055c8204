"""CommonsenseQA (Talmor et al., arXiv:1811.00937), which decontamination alone reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xverse.data.benchmarks.questions import QuestionReader, RawQuestion, text_of

NAME, FOLDERS = "commonsenseqa", ("commonsenseqa",)


def all_questions(data_dir: Path) -> Iterator[RawQuestion]:
    """Every question of every split."""
    for path in sorted((data_dir / "commonsenseqa").glob("*.jsonl")):
        for number, (where, row) in enumerate(QuestionReader(skip=True).objects(path)):
            choices = row.get("choices")
            yield RawQuestion(
                id=f"{path.stem}/{number}",
                where=where,
                text=text_of(row.get("question")),
                options=tuple(choices.get("text") or ()) if isinstance(choices, dict) else (),
                answer=row.get("answerKey"),
            )
