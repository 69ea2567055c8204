"""``xverse data prepare``: a folder of text becomes a tokenizer and token shards, split into train and valid.

    OUT/recipe.json            what made this folder; another recipe is refused
    OUT/tokenizer/             tokenizer.json and its configuration
    OUT/train/NAME/            one token shard for each source of text (xverse.data.shards)
    OUT/valid/NAME/            held-out documents
    OUT/report.json            the table that is printed, written last

Every file is a pure function of the recipe and the corpus, so a run that was killed is simply run again: what
is finished stays, the rest is made anew, byte for byte the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from xverse.config import UserError
from xverse.data.corpus import CorpusReport, Document, corpus_files, file_stem, read_documents
from xverse.data.shards import ShardHeader, ShardWriter, read_header
from xverse.files import atomic_directory, atomic_file
from xverse.log import notice, progress
from xverse.tokenizer import Tokenizer, train_tokenizer

BATCH_BYTES = 2_000_000
SPLITS = ("train", "valid")


@dataclass
class PrepareRecipe:
    """What ``prepare`` makes of which text.

    A source of text is a language (the documents' ``lang``), or a whole stem where the file is named
    ``CATEGORY_LANG.jsonl.gz`` (``code_py``). ``tokenizer_sample_bytes`` caps each source's part in training
    the tokenizer, ``tokenizer_sample_overrides`` names other caps. About ``valid_share`` of each source, at
    most ``valid_bytes``, is held out.
    """

    corpus: Path
    out: Path
    tokenizer: Path | None = None
    vocab_size: int = 12_288
    limit_alphabet: int | None = None
    tokenizer_sample_bytes: int = 1_000_000
    tokenizer_sample_overrides: dict[str, int] = field(default_factory=dict)
    valid_share: float = 0.01
    valid_bytes: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.valid_share < 1:
            raise ValueError(f"valid_share {self.valid_share} is not between 0 and 1")
        for name in ("vocab_size", "tokenizer_sample_bytes", "valid_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")


@dataclass
class Source:
    """One source of text: where it stands in the corpus and which of its documents are held out."""

    name: str
    language: str
    category: str
    files: list[int] = field(default_factory=list)
    documents: int = 0
    text_bytes: int = 0
    valid: set[int] = field(default_factory=set)


@dataclass
class Scan:
    """What one pass over the corpus found. ``duplicates`` are (file index, document ordinal)."""

    files: list[Path]
    sources: dict[str, Source]
    duplicates: set[tuple[int, int]]
    reports: list[CorpusReport]

    def owner(self, file: int) -> str:
        """The first source, by name, that stands in a file."""
        return next(name for name, source in self.sources.items() if file in source.files)


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
    """The result of ``prepare``."""

    sources: list[PreparedSource]
    duplicates: int
    skipped: dict[str, str]
    vocab_size: int
    tokenizer: str


def prepare(recipe: PrepareRecipe) -> PrepareReport:
    """Make ``recipe.out`` from ``recipe.corpus``, or what is missing of it.

    Raises UserError for a missing or empty corpus, a folder that another recipe made, and damaged shards.
    """
    paths = [path for group in corpus_files(recipe.corpus).values() for path in group]
    fingerprint = _claim(recipe, paths)
    _clear_leftovers(recipe.out)
    report = _finished(recipe, fingerprint)
    if report is not None:
        notice(f"{recipe.out}: complete, nothing to do")
        return report
    with progress() as bar:
        scan = scan_corpus(paths, recipe, bar)
        tokenizer = _tokenizer(recipe, scan, bar)
        total = sum(source.text_bytes for source in scan.sources.values())
        task = bar.add_task("tokenizing, KB", total=total // 1000)
        for source in scan.sources.values():
            write_source(recipe, scan, source, tokenizer, fingerprint, bar, task)
    report = _report(recipe, scan, tokenizer)
    with atomic_file(recipe.out / "report.json") as temporary:
        _write_json(temporary, {"recipe": fingerprint, **dataclasses.asdict(report)})
    return report


def source_of(stem: str, language: str) -> tuple[str, str]:
    """The source's name and category for a document of a language in a file of a stem."""
    if stem.endswith(f"_{language}"):
        return stem, stem.removesuffix(f"_{language}")
    return language, "text"


def text_hash(text: str, seed: int) -> int:
    """64 bits that identify a text and, by the seed, decide about holding it out."""
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "big"
    )


def scan_corpus(paths: list[Path], recipe: PrepareRecipe, bar: Progress) -> Scan:
    """Read the corpus once: its sources, exact duplicates (all but the first), and the held-out documents."""
    sources: dict[str, Source] = {}
    sizes: dict[str, dict[int, int]] = {}
    seen: set[int] = set()
    scan = Scan(paths, sources, set(), [])
    for index, path in enumerate(bar.track(paths, description="reading, files")):
        scan.reports.append(CorpusReport())
        for ordinal, document in enumerate(read_documents(path, scan.reports[index])):
            key = text_hash(document.text, recipe.seed)
            if key in seen:
                scan.duplicates.add((index, ordinal))
                continue
            seen.add(key)
            name, category = source_of(file_stem(path), document.lang)
            source = sources.setdefault(name, Source(name, document.lang, category))
            if index not in source.files:
                source.files.append(index)
            size = len(document.text.encode())
            sizes.setdefault(name, {})[key] = size
            source.documents += 1
            source.text_bytes += size
    if not sources:
        why = "; ".join(filter(None, (report.describe() for report in scan.reports)))
        raise UserError(f"{recipe.corpus}: no usable document in this corpus{f' ({why})' if why else ''}")
    for path, found in zip(paths, scan.reports, strict=True):
        if found.describe():
            notice(f"{path.name}: {found.describe()}")
    for name, source in sources.items():
        source.valid = choose_valid(sizes[name], recipe.valid_share, recipe.valid_bytes)
    scan.sources = dict(sorted(sources.items()))
    return scan


def choose_valid(sizes: dict[int, int], share: float, most: int) -> set[int]:
    """The hashes of the held-out documents: the lowest hashes, until a share of the bytes is reached.

    Documents longer than ``most`` stay in training; so does everything of a source under ten documents.
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


def _documents(scan: Scan, source: Source, seed: int) -> Iterator[tuple[Document, int]]:
    """A source's documents without duplicates, each with its hash."""
    for index in source.files:
        stem = file_stem(scan.files[index])
        for ordinal, document in enumerate(read_documents(scan.files[index], CorpusReport())):
            if source_of(stem, document.lang)[0] == source.name and (index, ordinal) not in scan.duplicates:
                yield document, text_hash(document.text, seed)


def write_source(
    recipe: PrepareRecipe,
    scan: Scan,
    source: Source,
    tokenizer: Tokenizer,
    fingerprint: str,
    bar: Progress,
    task: TaskID,
) -> None:
    """Write the source's shards that are missing, train and valid in one pass."""
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for split in SPLITS:
            held = len(source.valid)
            count = held if split == "valid" else source.documents - held
            path = recipe.out / split / source.name
            header = read_header(path)
            if header is not None and (header.tokenizer, header.recipe) != (tokenizer.hash, fingerprint):
                raise UserError(
                    f"{path}: made by another recipe or tokenizer; delete it or choose another out"
                )
            if header is None and count:
                header = ShardHeader(tokenizer.hash, source.language, source.category, fingerprint)
                writers[split] = stack.enter_context(ShardWriter(path, header))
        if not writers:
            bar.advance(task, source.text_bytes / 1000)
            return
        pending: dict[str, list[str]] = {split: [] for split in writers}
        sizes = dict.fromkeys(writers, 0)

        def flush(split: str) -> None:
            encoded = tokenizer.encode_batch(pending[split])
            for ids in encoded:
                ids.append(tokenizer.eos_id)
            writers[split].add(encoded, sizes[split])
            bar.advance(task, sizes[split] / 1000)
            pending[split], sizes[split] = [], 0

        for document, key in _documents(scan, source, recipe.seed):
            split = "valid" if key in source.valid else "train"
            if split in writers:
                pending[split].append(document.text)
                sizes[split] += len(document.text.encode())
                if sizes[split] >= BATCH_BYTES:
                    flush(split)
        for split, writer in writers.items():
            flush(split)
            writer.finish()


def _tokenizer(recipe: PrepareRecipe, scan: Scan, bar: Progress) -> Tokenizer:
    """The tokenizer in ``out/tokenizer``; made there first, by training or from ``recipe.tokenizer``."""
    folder = recipe.out / "tokenizer"
    if folder.exists():
        return Tokenizer.load(folder)
    if recipe.tokenizer is not None:
        tokenizer = Tokenizer.load(recipe.tokenizer)
    else:
        task = bar.add_task("training the tokenizer", total=None)
        sample = sample_texts(recipe, scan)
        tokenizer = train_tokenizer(sample, recipe.vocab_size, limit_alphabet=recipe.limit_alphabet)
        bar.remove_task(task)
    with atomic_directory(folder) as temporary:
        tokenizer.save(temporary)
    return Tokenizer.load(folder)


def sample_texts(recipe: PrepareRecipe, scan: Scan) -> Iterator[str]:
    """Training texts for the tokenizer: of each source, documents chosen by hash up to about its cap."""
    for source in scan.sources.values():
        cap = recipe.tokenizer_sample_overrides.get(source.name, recipe.tokenizer_sample_bytes)
        threshold = min(1.0, cap / source.text_bytes)
        for document, key in _documents(scan, source, recipe.seed):
            # The low bits: the high ones already decide about holding out.
            if key not in source.valid and (key & 0xFFFFFFFF) / 2**32 < threshold:
                yield document.text


def _claim(recipe: PrepareRecipe, paths: list[Path]) -> str:
    """Mark the folder as this recipe's, or refuse it; returns the recipe's fingerprint."""
    settings: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(recipe).items() if name not in ("corpus", "out")
    }
    settings["tokenizer"] = Tokenizer.load(recipe.tokenizer).hash if recipe.tokenizer is not None else None
    settings["files"] = {path.name: path.stat().st_size for path in paths}
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file = recipe.out / "recipe.json"
    if not file.exists():
        if recipe.out.is_dir() and any(not item.name.startswith(".") for item in recipe.out.iterdir()):
            raise UserError(
                f"{recipe.out}: not empty and not made by xverse data prepare; choose another out"
            )
        with atomic_file(file) as temporary:
            _write_json(temporary, {"fingerprint": fingerprint, **settings})
        return fingerprint
    try:
        made_by = json.loads(file.read_text(encoding="utf-8"))
        if made_by["fingerprint"] == fingerprint:
            return fingerprint
        different = [name for name, value in settings.items() if made_by.get(name) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); delete {recipe.out} or choose another out") from None
    raise UserError(
        f"{recipe.out}: made by another recipe (differs in {', '.join(different) or 'version'}); "
        "choose another out or delete the folder"
    )


def _clear_leftovers(out: Path) -> None:
    """Remove what a killed run was writing: the temporaries of atomic_file and atomic_directory."""
    for left in out.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _finished(recipe: PrepareRecipe, fingerprint: str) -> PrepareReport | None:
    file = recipe.out / "report.json"
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("recipe") != fingerprint:
            return None
        report = PrepareReport(**values)
        report.sources = [PreparedSource(**row) for row in values["sources"]]
    except (ValueError, KeyError, TypeError):
        return None
    rows = [(row.name, "train", row.documents) for row in report.sources]
    rows += [(row.name, "valid", row.valid_documents) for row in report.sources]
    for name, split, documents in rows:
        if documents and read_header(recipe.out / split / name) is None:
            return None
    return report if (recipe.out / "tokenizer" / "tokenizer.json").exists() else None


def _report(recipe: PrepareRecipe, scan: Scan, tokenizer: Tokenizer) -> PrepareReport:
    nothing = ShardHeader("", "")
    rows = []
    for name, source in scan.sources.items():
        train, valid = (read_header(recipe.out / split / name) or nothing for split in SPLITS)
        rows.append(
            PreparedSource(
                name,
                documents=train.documents,
                tokens=train.tokens,
                text_bytes=train.text_bytes + valid.text_bytes,
                valid_documents=valid.documents,
                valid_tokens=valid.tokens,
                # A bad line has no language: the file's first source answers for it.
                skipped_lines=sum(scan.reports[i].skipped for i in source.files if scan.owner(i) == name),
            )
        )
    reports = {path.name: found for path, found in zip(scan.files, scan.reports, strict=True)}
    return PrepareReport(
        rows,
        duplicates=len(scan.duplicates),
        skipped={name: found.describe() for name, found in reports.items() if found.describe()},
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.hash,
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
