"""``xverse data prepare``: text becomes a tokenizer and token shards, split into train and valid.

    OUT/recipe.json            the recipe of this folder; another one is refused
    OUT/tokenizer/             tokenizer.json and its configuration
    OUT/train/NAME/            one token shard for each source of text (xverse.data.shards)
    OUT/valid/NAME/            held-out documents
    OUT/report.md, report.png  what each stage kept and dropped, with examples
    OUT/skipped.txt            unreadable lines, with file and line number, if there are any
    OUT/report.json            the printed table, written last
    OUT/work/                  intermediate files, until the report is written

The phases: index (benchmark questions), clean (read, stages), copies (find duplicates), plan (drop copies,
hold out documents), tokenizer, encode, join, report. Every file is a pure function of recipe and text,
however it is run (``executor.py``). So a killed run is simply run again: finished files are kept, the others
are made again, byte for byte the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xverse.config import UserError
from xverse.data.prepare.clean import BuildIndex, Clean, StagesConfig
from xverse.data.prepare.duplicates import Documents, choose_copies, exact_pairs, near_pairs
from xverse.data.prepare.encode import SPLITS, Encode, Join, SplitPlan, SplitSource, documents
from xverse.data.prepare.executor import ExecutorConfig, Phase, run_phases
from xverse.data.prepare.ledger import UnitRecord
from xverse.data.prepare.readers import Input, Unit, corpus_units, input_units
from xverse.data.prepare.report import PreparedSource, PrepareReport, WriteReport, first_of, unreadable
from xverse.data.shards import read_header
from xverse.files import alone, atomic_directory, atomic_file
from xverse.log import notice
from xverse.texts import read_json
from xverse.tokenizer import train_tokenizer
from xverse.tokenizer.general import load_tokenizer_of


@dataclass
class PrepareRecipe:
    """The recipe of ``prepare``.

    The text is a ``corpus`` folder of JSON lines, or ``inputs`` of any kind. A source is a language (``lang``
    of the documents), or CATEGORY_LANG with a category, which a corpus file's name may give (``code_py``).
    ``tokenizer_sample_bytes`` limits the text of each source for training the tokenizer,
    ``tokenizer_sample_overrides`` sets other limits by source. About ``valid_share`` of each source, at most
    ``valid_bytes``, is held out. The run fails if more than ``max_bad_share`` of the lines are unreadable, or
    if a file is broken and ``allow_broken_files`` is false; lines above ``max_line_bytes`` are skipped.
    """

    corpus: Path | None = None
    out: Path = Path()
    tokenizer: Path | None = None
    vocab_size: int = 12_288
    limit_alphabet: int | None = None
    tokenizer_sample_bytes: int = 1_000_000
    tokenizer_sample_overrides: dict[str, int] = field(default_factory=dict)
    valid_share: float = 0.01
    valid_bytes: int = 100_000
    seed: int = 0
    inputs: list[Input] = field(default_factory=list)
    stages: StagesConfig = field(default_factory=StagesConfig)
    max_bad_share: float = 0.05
    allow_broken_files: bool = True
    max_line_bytes: int = 64_000_000
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        if self.out == Path():
            raise ValueError("missing key 'out'")
        if (self.corpus is None) == (not self.inputs):
            raise ValueError("give either corpus or inputs")
        for name in ("valid_share", "max_bad_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not between 0 and 1")
        for name in ("vocab_size", "tokenizer_sample_bytes", "valid_bytes", "max_line_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")

    def units(self) -> list[Unit]:
        """All files of the recipe. Raises UserError if there are none."""
        return corpus_units(self.corpus) if self.corpus is not None else input_units(self.inputs)


def prepare(recipe: PrepareRecipe) -> PrepareReport | None:
    """Make ``recipe.out`` or its missing parts; returns None if the work was submitted to a cluster's queue.

    Raises UserError for missing, empty or too damaged text, for a folder of another recipe or in use, for
    damaged shards and a full disk.
    """
    units = recipe.units()
    # Tasks of a cluster share the folder, but do not run this.
    with alone(recipe.out / ".lock", f"{recipe.out}: another xverse data prepare is using this folder"):
        return _prepare(recipe, units)


def _prepare(recipe: PrepareRecipe, units: list[Unit]) -> PrepareReport | None:
    fingerprint = claim(recipe, units)
    if recipe.executor.kind == "local":  # on a cluster, tasks of an earlier command may still be writing
        _clear_leftovers(recipe.out)
    report = _finished(recipe, fingerprint)
    work = recipe.out / "work"
    if report is not None:
        shutil.rmtree(work, ignore_errors=True)
        notice(f"{recipe.out}: complete, nothing to do")
        return report
    if not run_phases(phases(recipe, units, fingerprint), recipe.executor, work / "logs"):
        return None
    report = _finished(recipe, fingerprint)
    assert report is not None
    shutil.rmtree(work, ignore_errors=True)
    return report


def phases(recipe: PrepareRecipe, units: list[Unit], fingerprint: str) -> list[Phase]:
    """The phases of a run, in order."""
    work, stages, count = recipe.out / "work", recipe.stages, len(units)
    tasks = min(count, recipe.executor.tasks)
    index, tokenizer = work / "questions.npz", recipe.out / "tokenizer"
    clean = Clean(units, stages, work / "docs", index, recipe.max_line_bytes, recipe.seed)
    first = [Phase("index", BuildIndex(stages.decontaminate, index))] if stages.decontaminate else []
    return [
        *first,
        Phase("clean", clean, tasks),
        Phase("copies", FindCopies(recipe, count), tasks),
        Phase("plan", MakePlan(recipe, units)),
        Phase("tokenizer", MakeTokenizer(recipe, count)),
        Phase("encode", Encode(work, tokenizer, [unit.size for unit in units], fingerprint), tasks),
        Phase("join", Join(work, recipe.out, tokenizer, count, fingerprint), tasks),
        Phase("report", WriteReport(recipe.out, [unit.name for unit in units], stages, fingerprint)),
    ]


@dataclass
class FindCopies:
    """Finds the pairs of copies whose hashes belong to a rank: ``WORK/pairs/RANK.npz``."""

    recipe: PrepareRecipe
    units: int

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        work, stage = self.recipe.out / "work", self.recipe.stages.near_duplicates
        stored = Documents(work / "docs", self.units)
        near = np.empty((0, 2), np.int64)
        if stage is not None:
            near = near_pairs(stored, rank, tasks, stage.least)
        with atomic_file(work / "pairs" / f"{rank:05d}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, exact=exact_pairs(stored, rank, tasks), near=near)


@dataclass
class MakePlan:
    """Decides the fate of each document: ``WORK/fates/UNIT.npy`` and ``WORK/plan.json``."""

    recipe: PrepareRecipe
    units: list[Unit]

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        work = self.recipe.out / "work"
        records = [UnitRecord.load(work / "docs" / f"{i:05d}.json") for i in range(len(self.units))]
        self._check(records)
        stored = Documents(work / "docs", len(self.units))
        pairs = [np.load(path) for path in sorted((work / "pairs").glob("*.npz"))]
        exact, near = (np.concatenate([part[kind] for part in pairs]) for kind in ("exact", "near"))
        fates = choose_copies(len(stored), exact, near)
        plan = SplitPlan({}, int(np.sum(fates == 1)), int(np.sum(fates == 2)))
        sizes: dict[str, dict[int, int]] = {}
        for i, record in enumerate(records):
            mine = fates[stored.starts[i] : stored.starts[i + 1]]
            with atomic_file(work / "fates" / f"{i:05d}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, mine)
            left = np.asarray(stored.keys[i])[mine == 0]
            for place, (name, language, category) in enumerate(record.sources):
                rows = left[left["source"] == place]
                source = plan.sources.setdefault(name, SplitSource(name, language, category))
                source.documents += len(rows)
                source.text_bytes += int(rows["bytes"].sum())
                sizes.setdefault(name, {}).update(
                    zip(rows["text"].tolist(), rows["bytes"].tolist(), strict=True)
                )
        for name, source in plan.sources.items():
            source.valid = sorted(choose_valid(sizes[name], self.recipe.valid_share, self.recipe.valid_bytes))
        plan.sources = {name: source for name, source in sorted(plan.sources.items()) if source.documents}
        for language in self._languages() - {source.language for source in plan.sources.values()}:
            notice(f"{language}: no document left in this language")
        with atomic_file(work / "plan.json") as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")

    def _languages(self) -> set[str]:
        stage = self.recipe.stages.language
        return set(stage.languages) if stage is not None else set()

    def _check(self, records: list[UnitRecord]) -> None:
        """Raise UserError if no document is left, or too much of the text is unreadable."""
        recipe = self.recipe
        where = recipe.corpus if recipe.corpus is not None else "inputs"
        problems = unreadable([unit.name for unit in self.units], records)
        for line in first_of(problems):
            notice(line)
        why = "; ".join(f"{name}: {text}" for name, text in problems.items())
        why = f" ({why[:500]})" if why else ""
        if not any(record.report.read for record in records):
            raise UserError(f"{where}: no usable document in this corpus{why}")
        if not any(record.sources for record in records):
            rules = sorted({rule for record in records for rule in record.ledger.dropped})
            raise UserError(f"{where}: the stages drop every document ({', '.join(rules)})")
        bad = sum(record.report.skipped for record in records)
        lines = bad + sum(record.report.read for record in records)
        if bad > recipe.max_bad_share * lines:
            raise UserError(
                f"{where}: {bad:,} of {lines:,} lines cannot be read, more than max_bad_share "
                f"{recipe.max_bad_share:g} allows{why}"
            )
        broken = [
            f"{unit.name}: {text}"
            for unit, record in zip(self.units, records, strict=True)
            for text in record.report.broken_files
        ]
        if broken and not recipe.allow_broken_files:
            raise UserError(
                f"{where}: {len(broken)} broken files, which allow_broken_files forbids: {broken[0]}"
            )


def choose_valid(sizes: dict[int, int], share: float, most: int) -> set[int]:
    """The hashes of the held-out documents: the lowest ones, up to a share of the bytes.

    Documents longer than ``most``, and all documents of a source with fewer than ten, stay in training.
    """
    budget = min(most, share * sum(sizes.values()))
    chosen: set[int] = set()
    used = 0
    if len(sizes) < 10 or share == 0:
        return chosen
    for key in sorted(sizes):
        if used >= budget:
            break
        if used + sizes[key] <= most:
            chosen.add(key)
            used += sizes[key]
    return chosen


@dataclass
class MakeTokenizer:
    """Makes ``OUT/tokenizer``: trains it or copies ``recipe.tokenizer``."""

    recipe: PrepareRecipe
    units: int

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        recipe, folder = self.recipe, self.recipe.out / "tokenizer"
        if folder.exists():
            return
        if recipe.tokenizer is not None:
            tokenizer = load_tokenizer_of(recipe.tokenizer)
        else:
            sample = self._sample()
            tokenizer = train_tokenizer(sample, recipe.vocab_size, limit_alphabet=recipe.limit_alphabet)
        with atomic_directory(folder) as temporary:
            tokenizer.save(temporary)

    def _sample(self) -> Iterator[str]:
        """Training texts: documents of each source chosen by hash, up to about its limit."""
        recipe, work = self.recipe, self.recipe.out / "work"
        plan = SplitPlan.load(work / "plan.json")
        thresholds, valid = {}, {}
        for name, source in plan.sources.items():
            cap = recipe.tokenizer_sample_overrides.get(name, recipe.tokenizer_sample_bytes)
            thresholds[name], valid[name] = min(1.0, cap / source.text_bytes), frozenset(source.valid)
        for unit in range(self.units):
            for row, key, fate in documents(work, unit):
                name = row["name"]
                # Low bits, because the high bits decide which documents are held out.
                if not fate and key not in valid[name] and (key & 0xFFFFFFFF) / 2**32 < thresholds[name]:
                    yield row["text"]


def claim(recipe: PrepareRecipe, units: list[Unit]) -> str:
    """Mark the folder as this recipe's; returns the recipe's fingerprint. Raises UserError for another's
    folder."""
    names = ("corpus", "out", "executor", "max_bad_share", "allow_broken_files")
    values = dataclasses.asdict(recipe)
    settings: dict[str, Any] = {name: value for name, value in values.items() if name not in names}
    settings["tokenizer"] = load_tokenizer_of(recipe.tokenizer).hash if recipe.tokenizer is not None else None
    settings["files"] = {unit.name: unit.size for unit in units}
    settings = json.loads(json.dumps(settings, default=str))
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file = recipe.out / "recipe.json"
    if not file.exists():
        if recipe.out.is_dir() and any(not item.name.startswith(".") for item in recipe.out.iterdir()):
            raise UserError(
                f"{recipe.out}: not empty and not made by xverse data prepare; choose another out"
            )
        with atomic_file(file) as temporary:
            text = json.dumps({"fingerprint": fingerprint, **settings}, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        return fingerprint
    try:
        made_by = read_json(file)
        if made_by["fingerprint"] == fingerprint:
            return fingerprint
        different = [name for name, value in settings.items() if made_by.get(name, value) != value]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); delete {recipe.out} or choose another out") from None
    made = f"another recipe (differs in {', '.join(different)})" if different else "another version of xverse"
    raise UserError(f"{recipe.out}: made by {made}; choose another out or delete the folder")


def _clear_leftovers(out: Path) -> None:
    """Remove the temporary files and folders of a killed run."""
    for folder in (out, *(out / "work" / name for name in ("", "docs", "pairs", "fates", "parts"))):
        for left in folder.glob(".*.tmp"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _finished(recipe: PrepareRecipe, fingerprint: str) -> PrepareReport | None:
    file = recipe.out / "report.json"
    if not file.exists():
        return None
    try:
        values = read_json(file)
        if values.pop("recipe") != fingerprint:
            return None
        report = PrepareReport(**values)
        report.sources = [PreparedSource(**row) for row in values["sources"]]
    except (UserError, KeyError, TypeError):
        return None
    rows = [(row.name, "train", row.documents) for row in report.sources]
    rows += [(row.name, "valid", row.valid_documents) for row in report.sources]
    for name, split, count in rows:
        assert split in SPLITS
        if count and read_header(recipe.out / split / name) is None:
            return None
    return report if (recipe.out / "tokenizer" / "tokenizer.json").exists() else None
