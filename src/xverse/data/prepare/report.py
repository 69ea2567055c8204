"""The report of ``xverse data prepare``: documents kept and dropped by stage, language and source."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xverse.config import need
from xverse.data.prepare.catalogue import Catalogue
from xverse.data.prepare.clean import StagesConfig
from xverse.data.prepare.encode import SPLITS, load_part
from xverse.data.prepare.ledger import GroupRecord, Ledger, Table, add_table, total, unreadable
from xverse.data.prepare.plan import SplitPlan
from xverse.data.shards import ShardHeader, read_header
from xverse.files import atomic_file, write_json, write_text
from xverse.markdown import table
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


@dataclass
class WriteReport:
    """The last phase: writes the reports."""

    out: Path
    catalogue: Catalogue
    stages: StagesConfig
    fingerprint: str

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        work = self.out / "work"
        plan, ledger = SplitPlan.load(work / "plan.json"), Ledger()
        problems: dict[str, str] = {}
        skipped: dict[str, int] = {}  # by source: a bad line has no language, so its file's first one
        bad_lines: list[str] = []
        for group in range(len(self.catalogue)):
            record = GroupRecord.load(work / "clean" / f"{group:05d}.json")
            ledger.add(record.ledger)
            ledger.add(load_part(work, group)[0])
            for unit, done in zip(self.catalogue.units(group), record.units, strict=True):
                if problem := unreadable(done.report):
                    problems[unit.name] = problem
                skipped[done.owner] = skipped.get(done.owner, 0) + done.report.skipped
                bad_lines += [f"{unit.name}, line {line}: {why}\n" for line, why in done.report.bad_lines]
        if bad_lines:
            write_text(self.out / "skipped.txt", "".join(bad_lines))
        report = self._report(plan, ledger, problems, skipped)
        about = _questions_about(work / "questions.npz") if self.stages.decontaminate is not None else {}
        write_text(self.out / "report.md", markdown(ledger, report, about, self.stages.any()))
        if self.stages.any():
            with atomic_file(self.out / "report.png") as temporary:
                plot(ledger, temporary)
        write_json(self.out / "report.json", {"recipe": self.fingerprint, **dataclasses.asdict(report)})

    def _report(
        self, plan: SplitPlan, ledger: Ledger, problems: dict[str, str], skipped: dict[str, int]
    ) -> PrepareReport:
        nothing = ShardHeader("", "")
        tokenizer = load_tokenizer_of(self.out / "tokenizer")
        rows = []
        for name in plan.sources:
            train, valid = (read_header(self.out / split / name) or nothing for split in SPLITS)
            size = train.text_bytes + valid.text_bytes
            counts = (train.documents, train.tokens, size, valid.documents, valid.tokens)
            rows.append(PreparedSource(name, *counts, skipped.get(name, 0)))
        return PrepareReport(
            rows,
            duplicates=plan.exact,
            skipped=problems,
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
        head = ["stage: rule", "documents", "bytes"]
        lines += ["## Dropped by stage and rule", "", *table(head, rows, "---:"), ""]
    if ledger.scrubbed:
        rows = [[f"`{mark}`", f"{count:,}"] for mark, count in sorted(ledger.scrubbed.items())]
        lines += ["## Personal data", "", *table(["placeholder", "replaced"], rows, "---:"), ""]
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
        lines += ["## Decontamination", "", *table(head, rows, "---:"), ""]
        for name, short in about["too_short"].items():
            more = f" and {len(short) - ROWS:,} more" if len(short) > ROWS else ""
            lines += [f"Too short to search for in {name}: {', '.join(short[:ROWS])}{more}.", ""]
    for title, column in (("language", 0), ("source", 1)):
        lines += [f"## By {title}", "", *_by(ledger, column, title), ""]
    if ledger.examples:
        lines += ["## Examples of dropped documents", ""]
        for why in sorted(ledger.examples, key=_order):
            lines += [f"**{why}**", ""]
            for _, lang, text in ledger.examples[why]:
                shown = " ".join(text.replace("`", "'").split())
                lines.append(f"- {lang or '?'}: `{shown}`")
            lines.append("")
    return "\n".join(lines)


def _by(ledger: Ledger, column: int, title: str) -> list[str]:
    read, kept = _fold(ledger.read, column), _fold(ledger.kept, column)
    stages: dict[str, Table] = {}
    for why, counts in ledger.dropped.items():
        into = stages.setdefault(why.split(":")[0], {})
        add_table(into, _fold(counts, column))
    names = [name for name in _STAGES if name in stages]
    rows = []
    keys = {*read, *kept, *(key for name in names for key in stages[name])}
    keys = set(sorted(keys, key=lambda key: (-read.get(key, [0, 0])[1], key))[:ROWS])
    for key in sorted(keys):
        before, after = read.get(key, [0, 0]), kept.get(key, [0, 0])
        dropped = (f"{stages[name].get(key, [0, 0])[0]:,}" for name in names)
        rows.append([key or "?", f"{before[0]:,}", *dropped, f"{after[0]:,}", f"{after[1]:,}"])
    return table([title, "read", *names, "kept", "kept bytes"], rows, "---:")


def _fold(table: Table, column: int) -> Table:
    folded: Table = {}
    for key, row in table.items():
        add_table(folded, {key.split("\t")[column]: row})
    return folded


def plot(ledger: Ledger, path: Path) -> None:
    """Plot kept and dropped documents by language, as a PNG file."""
    matplotlib = need("matplotlib.figure", "data", "report.png")
    tables = {"kept": _fold(ledger.kept, 0)}
    for name in _STAGES:
        parts = [_fold(table, 0) for why, table in ledger.dropped.items() if why.split(":")[0] == name]
        if parts:
            tables[name] = {
                key: [sum(part.get(key, [0])[0] for part in parts)] for part in parts for key in part
            }
    languages = sorted({key for table in tables.values() for key in table})
    figure = matplotlib.Figure(figsize=(max(6.0, 0.28 * len(languages)), 4.2), layout="constrained")
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
