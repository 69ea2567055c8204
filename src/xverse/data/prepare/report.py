"""The report of ``xverse data prepare``: documents kept and dropped by stage, language and source."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xverse.config import need
from xverse.data.prepare.clean import StagesConfig
from xverse.data.prepare.encode import SPLITS, SplitPlan, unit_record
from xverse.data.prepare.ledger import Ledger, Table, UnitRecord, total
from xverse.data.shards import ShardHeader, read_header
from xverse.files import atomic_file
from xverse.tokenizer.general import load_tokenizer_of


@dataclass
class PreparedSource:
    """One row of the table that ``prepare`` prints."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    valid_documents: int
    valid_tokens: int
    skipped_lines: int


@dataclass
class PrepareReport:
    """The result of ``prepare``. ``dropped``: documents by stage; ``scrubbed``: placeholders by kind;
    ``questions``: benchmark questions found, by benchmark."""

    sources: list[PreparedSource]
    duplicates: int
    skipped: dict[str, str]
    vocab_size: int
    tokenizer: str
    near_duplicates: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    scrubbed: dict[str, int] = field(default_factory=dict)
    questions: dict[str, int] = field(default_factory=dict)


FILES = 20  # reported one by one


def unreadable(names: list[str], records: list[UnitRecord]) -> dict[str, str]:
    """By name, the files with skipped lines or without documents, and the reason."""
    return {
        name: record.report.describe() or "no document in it"
        for name, record in zip(names, records, strict=True)
        if record.report.describe() or not record.report.read
    }


def first_of(problems: dict[str, str]) -> list[str]:
    """A line for each of the first files, and the number of further ones."""
    lines = [f"{name}: {text}" for name, text in problems.items()]
    more = len(lines) - FILES
    return lines if more <= 0 else [*lines[:FILES], f"and {more:,} more files, listed in report.md"]


@dataclass
class WriteReport:
    """The last phase: writes the reports."""

    out: Path
    units: list[str]
    stages: StagesConfig
    fingerprint: str

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        work = self.out / "work"
        plan = SplitPlan.load(work / "plan.json")
        records = [unit_record(work, i) for i in range(len(self.units))]
        ledger = Ledger()
        for record in records:
            ledger.add(record.ledger)
        report = self._report(plan, records, ledger)
        about = _questions_about(work / "questions.npz") if self.stages.decontaminate is not None else {}
        with atomic_file(self.out / "report.md") as temporary:
            temporary.write_text(markdown(ledger, report, about, self.stages.any()), encoding="utf-8")
        if self.stages.any():
            with atomic_file(self.out / "report.png") as temporary:
                plot(ledger, temporary)
        bad = [
            f"{name}, line {line}: {why}\n"
            for name, record in zip(self.units, records, strict=True)
            for line, why in record.report.bad_lines
        ]
        if bad:
            with atomic_file(self.out / "skipped.txt") as temporary:
                temporary.write_text("".join(bad), encoding="utf-8")
        with atomic_file(self.out / "report.json") as temporary:
            text = json.dumps(
                {"recipe": self.fingerprint, **dataclasses.asdict(report)}, indent=1, ensure_ascii=False
            )
            temporary.write_text(text + "\n", encoding="utf-8")

    def _report(self, plan: SplitPlan, records: list[UnitRecord], ledger: Ledger) -> PrepareReport:
        nothing = ShardHeader("", "")
        tokenizer = load_tokenizer_of(self.out / "tokenizer")
        owners = [min((row[0] for row in record.sources), default="") for record in records]
        rows = []
        for name in plan.sources:
            train, valid = (read_header(self.out / split / name) or nothing for split in SPLITS)
            # A bad line has no language, so it is counted for the file's first source.
            skipped = sum(
                record.report.skipped for record, owner in zip(records, owners, strict=True) if owner == name
            )
            size = train.text_bytes + valid.text_bytes
            rows.append(
                PreparedSource(
                    name, train.documents, train.tokens, size, valid.documents, valid.tokens, skipped
                )
            )
        return PrepareReport(
            rows,
            duplicates=plan.exact,
            skipped=unreadable(self.units, records),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.hash,
            near_duplicates=plan.near,
            dropped={stage: sum(counts) for stage, counts in stages_of(ledger).items()},
            scrubbed=dict(sorted(ledger.scrubbed.items())),
            questions={name: len(items) for name, items in sorted(ledger.questions.items())},
        )


def stages_of(ledger: Ledger) -> dict[str, list[int]]:
    """Numbers of documents dropped by each rule, for each stage that dropped any."""
    counts: dict[str, list[int]] = {}
    for why in sorted(ledger.dropped, key=_order):
        counts.setdefault(why.split(":")[0], []).append(total(ledger.dropped[why].values())[0])
    return counts


ROWS = 100  # largest rows of a table that are shown
_STAGES = ("normalise", "language", "quality", "decontaminate", "duplicates")


def _order(why: str) -> tuple[int, str]:
    return _STAGES.index(why.split(":")[0]), why


def markdown(ledger: Ledger, report: PrepareReport, about: dict[str, Any], plots: bool) -> str:
    """The report as Markdown."""
    read, kept = total(ledger.read.values()), total(ledger.kept.values())
    lines = [
        "# Prepared text",
        "",
        f"Read: {read[0]:,} documents, {read[1]:,} bytes. Kept: {kept[0]:,} documents, {kept[1]:,} bytes.",
        "",
    ]
    if plots:
        lines += ["![kept and dropped by language](report.png)", ""]
    if report.skipped:
        lines += ["## Unreadable", "", "skipped.txt lists the lines (the first thousand of a file).", ""]
        lines += [f"- {name}: {text}" for name, text in report.skipped.items()] + [""]
    if ledger.dropped:
        rows = [
            [why, *(f"{count:,}" for count in total(ledger.dropped[why].values()))]
            for why in sorted(ledger.dropped, key=_order)
        ]
        lines += [
            "## Dropped by stage and rule",
            "",
            *_table(["stage: rule", "documents", "bytes"], rows),
            "",
        ]
    if ledger.scrubbed:
        rows = [[f"`{mark}`", f"{count:,}"] for mark, count in sorted(ledger.scrubbed.items())]
        lines += ["## Personal data", "", *_table(["placeholder", "replaced"], rows), ""]
    if about:
        rows = [
            [
                name,
                f"{count:,}",
                f"{len(about['too_short'].get(name, ())):,}",
                f"{len(ledger.questions.get(name, ())):,}",
                f"{total(ledger.dropped.get(f'decontaminate: {name}', {}).values())[0]:,}",
            ]
            for name, count in about["items"].items()
        ]
        head = ["benchmark", "questions", "too short to search for", "found", "documents dropped"]
        lines += ["## Decontamination", "", *_table(head, rows), ""]
        for name, short in about["too_short"].items():
            more = f" and {len(short) - ROWS:,} more" if len(short) > ROWS else ""
            lines += [f"Too short to search for in {name}: {', '.join(short[:ROWS])}{more}.", ""]
    for title, column in (("language", 0), ("source", 1)):
        lines += [f"## By {title}", "", *_by(ledger, column, title), ""]
    if ledger.examples:
        lines += ["## Examples of dropped documents", ""]
        for why in sorted(ledger.examples, key=_order):
            lines += [f"**{why}**", ""]
            lines += [f"- {lang or '?'}: `{_one_line(text)}`" for _, lang, text in ledger.examples[why]] + [
                ""
            ]
    return "\n".join(lines)


def _by(ledger: Ledger, column: int, title: str) -> list[str]:
    read, kept = _fold(ledger.read, column), _fold(ledger.kept, column)
    stages: dict[str, Table] = {}
    for why, table in ledger.dropped.items():
        into = stages.setdefault(why.split(":")[0], {})
        for key, (documents, size) in _fold(table, column).items():
            row = into.setdefault(key, [0, 0])
            row[0] += documents
            row[1] += size
    names = [name for name in _STAGES if name in stages]
    rows = []
    keys = {*read, *kept, *(key for name in names for key in stages[name])}
    keys = set(sorted(keys, key=lambda key: (-read.get(key, [0, 0])[1], key))[:ROWS])
    for key in sorted(keys):
        before, after = read.get(key, [0, 0]), kept.get(key, [0, 0])
        counts = [f"{stages[name].get(key, [0, 0])[0]:,}" for name in names]
        rows.append([key or "?", f"{before[0]:,}", *counts, f"{after[0]:,}", f"{after[1]:,}"])
    return _table([title, "read", *names, "kept", "kept bytes"], rows)


def _fold(table: Table, column: int) -> Table:
    folded: Table = {}
    for key, (documents, size) in table.items():
        row = folded.setdefault(key.split("\t")[column], [0, 0])
        row[0] += documents
        row[1] += size
    return folded


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def plot(ledger: Ledger, path: Path) -> None:
    """Plot kept and dropped documents by language, as a PNG file."""
    need("matplotlib", "data", "report.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = {"kept": _fold(ledger.kept, 0)}
    for name in _STAGES:
        parts = [_fold(table, 0) for why, table in ledger.dropped.items() if why.split(":")[0] == name]
        if parts:
            tables[name] = {
                key: [sum(part.get(key, [0])[0] for part in parts)] for part in parts for key in part
            }
    languages = sorted({key for table in tables.values() for key in table})
    figure = Figure(figsize=(max(6.0, 0.28 * len(languages)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bottom = np.zeros(len(languages))
    counts = {name: np.array([table.get(key, [0])[0] for key in languages]) for name, table in tables.items()}
    everything = np.maximum(1, sum(counts.values()))
    for name, values in counts.items():
        axes.bar(languages, 100 * values / everything, bottom=bottom, label=name, width=0.8)
        bottom = bottom + 100 * values / everything
    axes.set_ylabel("documents, %")
    axes.set_ylim(0, 100)
    axes.tick_params(axis="x", labelsize=8, rotation=90)
    axes.legend(fontsize=8, ncols=len(counts), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, format="png", dpi=120)


def _questions_about(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        about: dict[str, Any] = json.loads(arrays["about"].tobytes())
        return about
