"""Sixty everyday first questions that training never asks: print a model's greedy replies and score them.

python -m recipes.skills.questions MODEL [--allow-code] [--markdown FILE]

A reply counts if it is right by the rule in ``questions.jsonl``, ends by itself and repeats nothing. MODEL is
a directory or ``nano``. The exit code is 1 if fewer than 60 % of the replies count.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.nano.accept import collect, load_greedy
from recipes.skills.common import ROOT, read
from xverse.cli import Parser, guarded
from xverse.eval import replies

QUESTIONS = ROOT / "recipes" / "skills" / "questions.jsonl"
WANTED = 0.6


def judge(rows: Sequence[dict[str, Any]], model: str, allow_code: bool) -> list[dict[str, Any]]:
    """The rows with the model's ``reply`` and its ``problem`` or None. Raises UserError for a wrong model."""
    session = load_greedy(model)
    answers = collect(session, [("questions", row["language"], [row["question"]]) for row in rows])
    return [
        {
            **row,
            "reply": answer.text,
            "problem": replies.problem(answer.text, answer.finish_reason, row["check"], allow_code),
        }
        for row, answer in zip(rows, answers, strict=True)
    ]


def as_markdown(judged: Sequence[dict[str, Any]]) -> str:
    """All questions and replies for a model card. Replies are in code blocks, which show them unchanged."""
    lines = [_summary(judged), "", "Greedy replies, unedited."]
    for row in judged:
        longest = max((len(run) for run in re.findall("`+", row["reply"])), default=0)
        fence = "`" * max(3, longest + 1)
        verdict = "right" if row["problem"] is None else row["problem"]
        lines += ["", f"**{row['question']}** ({verdict})", "", f"{fence}text", row["reply"], fence]
    return "\n".join(lines) + "\n"


def _summary(judged: Sequence[dict[str, Any]]) -> str:
    parts = []
    for language in dict.fromkeys(row["language"] for row in judged):
        rows = [row for row in judged if row["language"] == language]
        parts.append(f"{sum(row['problem'] is None for row in rows)} of {len(rows)} in {language}")
    return f"Right or honestly declined: {', '.join(parts)}."


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("questions", lambda: _ask(arguments))


def _ask(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m recipes.skills.questions", description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="model directory, or nano")
    parser.add_argument("--allow-code", action="store_true", help="run the programs that the model writes")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write questions and replies as Markdown"
    )
    args = parser.parse_args(arguments)

    from xverse.files import atomic_file

    judged = judge(list(read(QUESTIONS)), args.model, args.allow_code)
    if args.markdown is not None:
        with atomic_file(args.markdown) as temporary:
            temporary.write_text(as_markdown(judged), encoding="utf-8")
    for row in judged:
        print(f"{'  ' if row['problem'] is None else '! '}> {row['question']}\n{row['reply']}")
        if row["problem"] is not None:
            print(f"  [{row['problem']}; right: {row['right']}]")
    print(_summary(judged))
    return 0 if sum(row["problem"] is None for row in judged) >= WANTED * len(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
