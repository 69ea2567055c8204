"""The cost of preparing text, and the quality of its stages.

Parts: ``encode`` (shards written, against the ``tokenizers`` library on the same texts), ``pipeline`` (every
stage over a corpus), ``duplicates`` (planted copies), ``language`` (held-out lines), ``questions`` (planted
benchmark questions).
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies.common import add_directory
from xverse.bench.options import positive
from xverse.config import UserError

PARTS = ("encode", "pipeline", "duplicates", "language", "questions")
# Code, addresses and file names, which are not prose of any language.
_NOISE = re.compile(r"https?://\S+|\S+@\S+|`[^`]*`|\]\([^)]*\)|<[^>]*>")
_CODE = re.compile(r"[={}_;|]|[a-z]\.[a-z]")
_CHARACTERS = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, metavar="DIR", help="a folder of {language}.jsonl.gz")
    parser.add_argument("--part", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--tokenizer", metavar="DIR", help="a tokenizer's folder (default: nano's)")
    parser.add_argument("--data-dir", metavar="DIR", help="the folder of benchmarks to look for in the text")
    add_directory(parser)
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: all usable cores)")
    parser.add_argument(
        "--repeat", type=positive, default=1, metavar="N", help="copies of the corpus to encode (encode)"
    )
    parser.add_argument(
        "--lines", type=positive, default=300, metavar="N", help="lines of each language (language)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(**vars(args))


def measure(
    corpus: str,
    part: str | None = None,
    tokenizer: str | None = None,
    data_dir: str | None = None,
    directory: str | None = None,
    workers: int | None = None,
    repeat: int = 1,
    lines: int = 300,
) -> dict[str, Any]:
    """Measure one part, or all. ``corpus``: a folder of ``{language}.jsonl.gz``, ``data_dir``: benchmarks."""
    from xverse.formats import resolve
    from xverse.hardware import cores

    folder, workers = Path(corpus), workers or cores().usable
    if not folder.is_dir():
        raise UserError(f"{corpus}: no such corpus folder")
    model = Path(tokenizer) if tokenizer else resolve("nano")
    evaluation = Path(data_dir) if data_dir else None
    results: dict[str, Any] = {"bench": "data", "corpus": str(folder), "workers": workers}
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        for name in [part] if part else PARTS:
            if name == "encode":
                results[name] = _encode(folder, model, Path(temporary), workers, repeat)
            elif name == "pipeline":
                results[name] = _pipeline(folder, model, Path(temporary), workers, evaluation)
            elif name == "duplicates":
                results[name] = planted_copies(_documents(folder), 1_000)
            elif name == "language":
                results[name] = _language(folder, lines)
            elif evaluation is not None:
                results[name] = planted_questions(evaluation, _documents(folder))
            else:
                results[name] = {"not_measured": "--data-dir names the folder of the benchmarks"}
            print(f"{name}: " + json.dumps(results[name], ensure_ascii=False))
    return results


def _executor(workers: int) -> Any:
    """Several tasks for each worker, also of a small corpus, which would be read in one."""
    from xverse.data.prepare.executor import ExecutorConfig

    return ExecutorConfig(workers=workers, tasks=4 * workers)


def _encode(folder: Path, model: Path, out: Path, workers: int, repeat: int) -> dict[str, Any]:
    """Bytes of text per second: the library on texts in memory with ``workers`` threads; our pipeline."""
    import tokenizers

    from xverse.data.prepare.executor import run_phases
    from xverse.data.prepare.pipeline import PrepareRecipe, claim, phases
    from xverse.tokenizer import Tokenizer

    vocabulary = Tokenizer.load(model).vocab_size
    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = str(workers), "true"
    texts = list(_documents(folder))
    size = sum(len(text.encode()) for text in texts)
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.encode_batch_fast(texts[:64], add_special_tokens=False)
    start = time.perf_counter()
    for first in range(0, len(texts), 1_000):
        backend.encode_batch_fast(texts[first : first + 1_000], add_special_tokens=False)
    library = time.perf_counter() - start
    del texts
    source = _repeated(folder, out / "repeated", repeat) if repeat > 1 else folder
    recipe = PrepareRecipe(source, out / "encoded", tokenizer=model, executor=_executor(workers), seed=1)
    units = recipe.units()
    memory = out / "memory"
    steps = [_watched(step, memory) for step in phases(recipe, units, claim(recipe, units))]
    cut = [step.name for step in steps].index("encode")
    logs = recipe.out / "work" / "logs"
    run_phases(steps[:cut], recipe.executor, logs)
    start = time.perf_counter()
    last = [step.name for step in steps].index("report")
    run_phases(steps[cut:last], recipe.executor, logs)
    shards = time.perf_counter() - start
    run_phases(steps[last:], recipe.executor, logs)
    report = json.loads((recipe.out / "report.json").read_text(encoding="utf-8"))
    written = sum(row["text_bytes"] for row in report["sources"])
    rate, ours = size / library, written / shards
    shutil.rmtree(recipe.out)
    return {
        "vocabulary": vocabulary,
        "library_mb_s": round(rate / 1e6, 4),
        "shards_mb_s": round(ours / 1e6, 4),
        "share": round(ours / rate, 3),
        "text_mb": round(written / 1e6, 4),
        "peak_mb": _peaks(memory),
    }


def _repeated(folder: Path, out: Path, times: int) -> Path:
    """A corpus ``times`` as large, in which all documents differ, since duplicates would be removed."""
    out.mkdir()
    for path in folder.glob("*.jsonl.gz"):
        name = path.name.removesuffix(".jsonl.gz")
        with ExitStack() as stack:
            lines = stack.enter_context(gzip.open(path, "rt", encoding="utf-8"))
            files = [
                stack.enter_context(gzip.open(out / f"{name}.{copy}.jsonl.gz", "wt", 1, encoding="utf-8"))
                for copy in range(times)
            ]
            for line in lines:
                row = json.loads(line)
                for copy, file in enumerate(files):
                    other = {**row, "text": f"{copy} {row['text']}"}
                    file.write(json.dumps(other, ensure_ascii=False) + "\n")
    return out


@dataclass
class _Watched:
    """The work of a phase, after which the worker records its peak memory."""

    work: Callable[[Any, int, int], None]
    folder: Path

    def __call__(self, data: Any, rank: int, tasks: int) -> None:
        from xverse.hardware import process_memory

        self.work(data, rank, tasks)
        if multiprocessing.parent_process() is None:  # a phase with one task runs in this process
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{rank}").write_text(str(process_memory("VmHWM") or 0))


def _watched(phase: Any, memory: Path) -> Any:
    return dataclasses.replace(phase, work=_Watched(phase.work, memory / phase.name))


def _peaks(memory: Path) -> dict[str, float]:
    """Peak memory of any worker at the end of each phase, in MB; workers serve several phases."""
    peaks: dict[str, float] = {}
    for phase in sorted(memory.glob("*"), key=lambda path: path.stat().st_mtime):
        peaks[phase.name] = round(max(int(file.read_text()) for file in phase.iterdir()) / 1e6)
    return peaks


def _pipeline(folder: Path, model: Path, out: Path, workers: int, evaluation: Path | None) -> dict[str, Any]:
    """Seconds of every phase with all stages enabled."""
    from xverse.data.prepare.clean import StagesConfig
    from xverse.data.prepare.duplicates import DuplicatesStage
    from xverse.data.prepare.executor import run_phases
    from xverse.data.prepare.pipeline import PrepareRecipe, claim, phases
    from xverse.data.prepare.stages.decontaminate import DecontaminateStage
    from xverse.data.prepare.stages.language import LanguageStage
    from xverse.data.prepare.stages.quality import QualityStage

    stages = StagesConfig(True, LanguageStage(), QualityStage(), True, DuplicatesStage())
    if evaluation is not None:
        stages.decontaminate = DecontaminateStage(evaluation)
    recipe = PrepareRecipe(
        folder, out / "prepared", tokenizer=model, stages=stages, executor=_executor(workers)
    )
    units = recipe.units()
    seconds, memory = {}, out / "memory"
    for step in phases(recipe, units, claim(recipe, units)):
        phase = _watched(step, memory)
        start = time.perf_counter()
        run_phases([phase], recipe.executor, recipe.out / "work" / "logs")
        seconds[phase.name] = round(time.perf_counter() - start, 2)
    report = json.loads((recipe.out / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(recipe.out)
    return {
        "seconds": round(sum(seconds.values()), 1),
        "phases": seconds,
        "kept_mb": round(sum(row["text_bytes"] for row in report["sources"]) / 1e6, 1),
        "dropped": report["dropped"],
        "peak_mb": _peaks(memory),
    }


def similarity(
    first: Sequence[int] | NDArray[np.uint64], second: Sequence[int] | NDArray[np.uint64]
) -> float:
    """The Jaccard index of two texts' 5-grams, from their hashed words, uint64 [words]."""
    from xverse.data.prepare.signatures import shingles

    one, two = (set(shingles(np.asarray(text, np.uint64)).tolist()) for text in (first, second))
    return len(one & two) / max(1, len(one | two))


def planted_copies(documents: Iterator[str], count: int, seed: int = 0) -> dict[str, Any]:
    """Recall and precision of near-duplicate detection: ``count`` copies with Jaccard similarity 0.8 to 1 are
    planted among their originals, ``count`` similar texts below 0.7 and ``count`` unrelated ones."""
    from xverse.data.prepare.duplicates import DuplicatesStage
    from xverse.data.prepare.ngrams import split_words

    rng = random.Random(seed)
    texts: list[list[str]] = []
    for document in documents:
        split = split_words(document)
        for start in range(0, min(len(split), 1_200) - 120, 400):
            texts.append(split[start : start + rng.randrange(120, 400)])
    rng.shuffle(texts)
    texts = texts[: 3 * count]
    vocabulary = sorted({word for text in texts[:200] for word in text})
    numbers = [_numbers(text) for text in texts]
    planted: list[tuple[int, int, float]] = []  # (original, copy, similarity)
    while len(planted) < 2 * count:
        original = len(planted)
        text, edits = list(texts[original]), rng.random() * (0.06 if len(planted) < count else 0.3)
        for place in range(len(text)):
            if rng.random() < edits:
                text[place] = rng.choice(vocabulary)
        copy = _numbers(text)
        like = similarity(numbers[original], copy)
        if (like >= 0.8) if len(planted) < count else (0.2 < like < 0.7):
            planted.append((original, len(numbers), like))
            numbers.append(copy)
    near = _find(numbers, DuplicatesStage().least)
    copies = {copy for _, copy, like in planted if like >= 0.8}
    original_of = {copy: original for original, copy, _ in planted}
    found = {copy for first, copy in near}
    good = {
        c
        for a, c in near
        if similarity(numbers[a], numbers[c]) >= 0.8 or (original_of.get(c) == a and c in copies)
    }
    return {
        "copies": len(copies),
        "texts": len(numbers),
        "recall": round(len(copies & found) / len(copies), 4),
        "precision": round(len(good) / max(1, len(found)), 4),
    }


def _numbers(text: list[str]) -> Any:
    from xverse.data.prepare.ngrams import hash_words

    return hash_words(" ".join(text))


def _find(numbers: list[Any], least: float) -> list[tuple[int, int]]:
    from xverse.data.prepare.duplicates import near_pairs
    from xverse.data.prepare.keys import Keys, KeyWriter
    from xverse.data.prepare.signatures import BANDS

    with tempfile.TemporaryDirectory() as temporary:
        with KeyWriter(Path(temporary) / "00000", near=True) as writer:
            for number, words in enumerate(numbers):
                writer.add(number, 0, 0, words)
        keys = Keys(Path(temporary), np.array([len(numbers)]))
        bands = [near_pairs(keys, band, 0, 1, least) for band in range(BANDS)]
        pairs = np.unique(np.concatenate(bands), axis=0)
    return [(int(first), int(copy)) for first, copy in pairs]


def planted_questions(
    data_dir: Path,
    documents: Iterator[str],
    benchmarks: list[str] | None = None,
    most: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How many benchmark questions (at most ``most`` of each benchmark) are found, each planted in a separate
    text in the form of a prompt; and the number of false hits in texts without one."""
    from xverse.data.benchmarks.questions import LETTERS
    from xverse.data.prepare.stages.decontaminate import DecontaminateStage, make_index

    stage = DecontaminateStage(data_dir, benchmarks)
    items = list(stage.questions())
    index = make_index(items, stage.ngram, stage.overlap)
    rng = random.Random(seed)
    texts = [text for text in documents if 200 < len(text) < 4_000][:2_000]
    clean = [text for text in texts if not index.find(text)]
    result: dict[str, Any] = {}
    rng.shuffle(items)
    for name, item in items:
        row = result.setdefault(name, {"planted": 0, "found": 0})
        if most is not None and row["planted"] == most:
            continue
        text = rng.choice(clean)
        place = rng.randrange(len(text))
        options = [f"{letter}. {option}" for letter, option in zip(LETTERS, item.options, strict=False)]
        question = "\n".join((item.passage, item.text, *options))
        found = index.find(f"{text[:place]}\n{question}\n{text[place:]}")
        row["planted"] += 1
        row["found"] += any(benchmark == name for benchmark, _ in found)
    return {
        "benchmarks": result,
        "too_short": index.too_short,
        "texts_without": {"looked_at": len(texts), "something_found": len(texts) - len(clean)},
    }


def held_out_lines(corpus: Path, language: str, count: int, documents: int | None = None) -> list[str]:
    """Lines of prose of at least 50 characters, from the half of the documents that the word lists were not
    made from. Prose has no code, table or address, and at least 40 letters (25 if Chinese or Japanese). At
    most ``documents`` are read."""
    chosen = []
    with gzip.open(corpus / f"{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in itertools.islice(file, documents):
            text = json.loads(row)["text"]
            if hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2 == 0:
                continue
            inside = False
            for line in map(str.strip, text.split("\n")):
                if line.startswith(("```", "~~~")):
                    inside = not inside
                elif not inside and len(line) >= 50 and _is_prose(line):
                    chosen.append(line)
    random.Random(language).shuffle(chosen)
    return chosen[:count]


def _is_prose(line: str) -> bool:
    bare = _NOISE.sub(" ", line)
    if _CODE.search(bare):
        return False
    return sum(map(str.isalpha, bare)) >= (25 if _CHARACTERS.search(bare) else 40)


def _language(corpus: Path, count: int) -> dict[str, Any]:
    from xverse.data.prepare.stages.language import LANGUAGES, identify

    identify("The first call loads the model.")
    right, size, seconds = {}, 0, 0.0
    for language in LANGUAGES:
        if not (corpus / f"{language}.jsonl.gz").is_file():
            continue
        lines = held_out_lines(corpus, language, count)
        start = time.perf_counter()
        found = [identify(line)[0] for line in lines]
        seconds += time.perf_counter() - start
        size += sum(len(line.encode()) for line in lines)
        right[language] = sum(name == language for name in found) / max(1, len(lines))
    if not right:
        raise UserError(f"{corpus}: no {{language}}.jsonl.gz of a known language here")
    return {
        "macro_accuracy": round(statistics.mean(right.values()), 4),
        "lowest": {name: round(right[name], 3) for name in sorted(right, key=right.__getitem__)[:6]},
        "lines_each": count,
        "mb_s_one_core": round(size / seconds / 1e6, 2),
    }


def _documents(corpus: Path) -> Iterator[str]:
    from xverse.data.prepare.inputs import corpus_units
    from xverse.data.prepare.readers import read_unit
    from xverse.texts import MAX_LINE_BYTES, ReadReport

    for unit in corpus_units(corpus):
        for document in read_unit(unit, ReadReport(), MAX_LINE_BYTES):
            yield document.text
