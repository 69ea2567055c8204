"""``xverse data prepare``: text becomes a tokenizer and token shards, split into train and valid.

    OUT/recipe.json            the recipe of this folder; another one is refused
    OUT/tokenizer/             tokenizer.json and its configuration
    OUT/train/NAME/            one token shard for each source of text (xverse.data.shards)
    OUT/valid/NAME/            held-out documents
    OUT/report.md, report.png  what each stage kept and dropped, with examples
    OUT/skipped.txt            unreadable lines, with file and line number, if there are any
    OUT/report.json            the printed table, written last
    OUT/work/                  intermediate files, until the report is written

The phases: index (benchmark questions), clean (read, stages), gather (add up), copies (find duplicates), plan
(drop copies, hold out documents), sample and tokenizer, encode, layout, join and seal (shards), report. Every
result is a pure function of recipe and text, however it is run (``executor.py``). So a killed run is simply
run again: finished files are kept, the others are made again, byte for byte the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.data.prepare.catalogue import Catalogue
from xverse.data.prepare.clean import BuildIndex, Clean, StagesConfig
from xverse.data.prepare.encode import SPLITS, Encode
from xverse.data.prepare.executor import ExecutorConfig, Phase, run_phases
from xverse.data.prepare.inputs import Input, Unit, corpus_units, input_units
from xverse.data.prepare.join import Join, PlaceSegments, Seal
from xverse.data.prepare.plan import FindCopies, Gather, MakePlan
from xverse.data.prepare.report import PreparedSource, PrepareReport, WriteReport
from xverse.data.prepare.sample import MakeTokenizer, Sample, SampleLimits
from xverse.data.shards import read_header
from xverse.files import alone, write_json
from xverse.log import notice
from xverse.place import Place, read_list
from xverse.remote import version
from xverse.texts import read_json
from xverse.tokenizer.general import load_tokenizer_of
from xverse.tokenizer.recipe import TokenizerRecipe


@dataclass
class PrepareRecipe:
    """The recipe of ``prepare``.

    The text is a ``corpus`` folder or URL of JSON lines, or ``inputs`` of any kind. A source is a language
    (``lang`` of the documents), or CATEGORY_LANG with a category, which a corpus file's name may give
    (``code_py``).
    ``tokenizer_sample_bytes`` is about the text of each source for training the tokenizer,
    ``tokenizer_sample_overrides`` sets other sizes by source. About ``valid_share`` of each source, at most
    ``valid_bytes``, is held out. The run fails if more than ``max_bad_share`` of the lines are unreadable, or
    if a file is broken and ``allow_broken_files`` is false; lines above ``max_line_bytes`` are skipped.
    """

    URLS = ("corpus", "out")

    corpus: str | Path | None = None
    out: Path = Path()  # a URL is text until ``prepare`` takes it
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
        for name in ("tokenizer_sample_bytes", "valid_bytes", "max_line_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if min([self.seed, *self.tokenizer_sample_overrides.values()]) < 0:
            raise ValueError("seed and tokenizer_sample_overrides must not be negative")
        TokenizerRecipe(Path(), Path(), vocab_size=self.vocab_size, limit_alphabet=self.limit_alphabet)

    def units(self) -> list[Unit]:
        """All files of the recipe. Raises UserError if there are none."""
        return corpus_units(self.corpus) if self.corpus is not None else input_units(self.inputs)

    @property
    def limits(self) -> SampleLimits:
        return SampleLimits(self.tokenizer_sample_bytes, self.tokenizer_sample_overrides)


def prepare(recipe: PrepareRecipe) -> PrepareReport | None:
    """Make ``recipe.out`` or its missing parts; returns None if the work was submitted to a cluster's queue.

    Raises UserError for missing, empty or too damaged text, for a folder of another recipe or in use, for
    damaged shards and a full disk.
    """
    place, units = Place.of(recipe.out), recipe.units()
    recipe = dataclasses.replace(recipe, out=place.local)
    # Tasks of a cluster share the folder, but do not run this.
    with alone(recipe.out / ".lock", f"{recipe.out}: another xverse data prepare is using this folder"):
        return _prepare(recipe, units, place)


def _prepare(recipe: PrepareRecipe, units: list[Unit], place: Place) -> PrepareReport | None:
    fingerprint = claim(recipe, units)
    if place.url and (report := _sent(place.url, fingerprint)) is not None:
        notice(f"{place}: complete, nothing to do")
        return report
    if recipe.executor.kind == "local":  # on a cluster, tasks of an earlier command may still be writing
        _clear_leftovers(recipe.out)
    report = _finished(recipe, fingerprint)
    work = recipe.out / "work"
    if report is not None:
        shutil.rmtree(work, ignore_errors=True)
        notice(f"{recipe.out}: complete, nothing to do")
        place.send()
        return report
    if not run_phases(phases(recipe, units, fingerprint), recipe.executor, work / "logs"):
        return None
    report = _finished(recipe, fingerprint)
    assert report is not None
    shutil.rmtree(work, ignore_errors=True)
    place.send()
    return report


def phases(recipe: PrepareRecipe, units: list[Unit], fingerprint: str) -> list[Phase]:
    """The phases of a run, in order; writes the catalogue of its files."""
    out, work, stages, tokenizer = recipe.out, recipe.out / "work", recipe.stages, recipe.out / "tokenizer"
    inputs = list({id(unit.input): unit.input for unit in units}.values())
    wanted = recipe.executor.tasks if recipe.executor.kind == "local" else recipe.executor.most_tasks
    catalogue = Catalogue.write(work, inputs, units, wanted)
    groups, index, limits = len(catalogue), work / "questions.npz", recipe.limits
    tasks = min(groups, recipe.executor.most_tasks)
    # One group is small text: processes of their own would cost more than they save.
    others = recipe.executor.most_tasks if groups > 1 else 1
    where = str(recipe.corpus) if recipe.corpus is not None else "inputs"
    languages = list(stages.language.languages) if stages.language is not None else []
    clean = Clean(catalogue, stages, work / "clean", index, recipe.max_line_bytes, recipe.seed)
    gather = Gather(work, catalogue, where, recipe.max_bad_share, recipe.allow_broken_files)
    train = MakeTokenizer(out, recipe.tokenizer, recipe.vocab_size, recipe.limit_alphabet, limits, groups)
    shards = (work, out, tokenizer, fingerprint)
    return [
        *([Phase("index", BuildIndex(stages.decontaminate, index))] if stages.decontaminate else []),
        Phase("clean", clean, tasks),
        Phase("gather", gather),
        Phase("copies", FindCopies(work, stages.near_duplicates), others),
        Phase("plan", MakePlan(work, recipe.valid_share, recipe.valid_bytes, languages)),
        *([Phase("sample", Sample(work, limits, groups), tasks)] if recipe.tokenizer is None else []),
        Phase("tokenizer", train),
        Phase("encode", Encode(work, tokenizer, groups), tasks),
        Phase("layout", PlaceSegments(work, groups)),
        Phase("join", Join(*shards), others),
        Phase("seal", Seal(*shards), others),
        Phase("report", WriteReport(out, catalogue, stages, fingerprint)),
    ]


def claim(recipe: PrepareRecipe, units: list[Unit]) -> str:
    """Mark the folder as this recipe's; returns the recipe's fingerprint. Raises UserError for another's
    folder."""
    names = ("corpus", "out", "executor", "max_bad_share", "allow_broken_files")
    values = dataclasses.asdict(recipe)
    settings: dict[str, Any] = {name: value for name, value in values.items() if name not in names}
    settings["tokenizer"] = load_tokenizer_of(recipe.tokenizer).hash if recipe.tokenizer is not None else None
    for source in settings["inputs"]:
        if source["encoding"] is None:  # a key that folders of earlier versions do not have
            del source["encoding"]
    settings["files"] = {unit.name: unit.size for unit in units}
    settings = json.loads(json.dumps(settings, default=str))
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file = recipe.out / "recipe.json"
    if not file.exists():
        if recipe.out.is_dir() and any(not item.name.startswith(".") for item in recipe.out.iterdir()):
            raise UserError(
                f"{recipe.out}: not empty and not made by xverse data prepare; choose another out"
            )
        write_json(file, {"fingerprint": fingerprint, **settings})
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
    for folder in (
        out,
        *(out / "work" / name for name in ("", "clean", "pairs", "sample", "parts", "layout")),
    ):
        for left in folder.glob(".*.tmp"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _finished(recipe: PrepareRecipe, fingerprint: str) -> PrepareReport | None:
    file = recipe.out / "report.json"
    report = _report(file, fingerprint) if file.exists() else None
    if report is None:
        return None
    rows = [(row.name, "train", row.documents) for row in report.sources]
    rows += [(row.name, "valid", row.valid_documents) for row in report.sources]
    for name, split, count in rows:
        assert split in SPLITS
        if count and read_header(recipe.out / split / name) is None:
            return None
    return report if (recipe.out / "tokenizer" / "tokenizer.json").exists() else None


def _report(file: str | Path, fingerprint: str) -> PrepareReport | None:
    """The report in a file or at a URL; None if another recipe made it, or if it is damaged."""
    try:
        values = read_json(file)
        if values.pop("recipe") != fingerprint:
            return None
        report = PrepareReport(**values)
        report.sources = [PreparedSource(**row) for row in values["sources"]]
    except (UserError, KeyError, TypeError):
        return None
    return report


def _sent(url: str, fingerprint: str) -> PrepareReport | None:
    """The report of the complete folder at a URL, if there is one. Raises UserError for another recipe's."""
    if version(f"{url}/recipe.json") is None:
        return None
    if read_json(f"{url}/recipe.json")["fingerprint"] != fingerprint:
        raise UserError(f"{url}: made by another recipe; choose another out or delete the folder")
    return _report(f"{url}/report.json", fingerprint) if read_list(url) else None
