"""Tables in Markdown, which every report has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = ":---:") -> list[str]:
    """The lines of a table; ``align`` applies to the columns after the first."""
    marks = ["---", *[align] * (len(head) - 1)]
    return [f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |" for row in (head, marks, *rows)]
