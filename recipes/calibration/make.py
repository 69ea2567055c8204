"""Makes the calibration text that ships with the package: ``src/xverse/assets/calibration/text.jsonl.gz``.

    python recipes/calibration/make.py --corpus FOLDER

FOLDER holds ``{language}.jsonl.gz`` files of ``{"text": …, "lang": …, "source": …}`` lines, as
``recipes/nano/data.yaml`` reads them. Only sources whose licence allows redistribution are used (SOURCES);
code comes from this repository. Documents that ``xverse data prepare`` would hold out for validation are left
out, with a margin, so that a model's validation text is never its calibration text. The result is a function
of the corpus and of this file: the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

from xverse.data.prepare.clean import text_hash
from xverse.files import atomic_file
from xverse.records import read_records

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "src" / "xverse" / "assets" / "calibration" / "text.jsonl.gz"
# Each language takes equal parts of those that it has; the last, which was machine-translated, only if the
# others have too little.
SOURCES = ("common-voice", "gutenberg", "tico-19", "prc-laws", "classical-zh", "edgeai")
LANGUAGES = (  # noqa: SIM905
    "ar bg ca cs da de el en es et fa fi fr he hi hu id it ja kk ko lt lv mr ms nl no pl pt ro ru sk sl sr "
    "sv ta th tr uk vi zh"
).split()
BYTES = {"zh": 64_000, "en": 64_000}  # of text, UTF-8
OTHER_BYTES, CODE_BYTES = 10_000, 40_000
EXCERPT = 1_500  # characters of a document at most
HELD_OUT = 0.06  # share of documents, by hash, that are not used: at most 1 % of the bytes are held out
CODE = (
    "model/transformer.py",
    "engine/scheduler.py",
    "data/order.py",
    "texts.py",
    "serve/static/app.js",
    "files.py",
    "tokenizer/counting.py",
)


def excerpts(path: Path, source: str, most: int) -> Iterator[str]:
    """Parts of documents of ``source``, spread over the file, of ``most`` bytes together."""
    texts = [
        record["text"]
        for _, record in read_records(path)
        if record["source"] == source and text_hash(record["text"], 0) >= HELD_OUT * 2**64
    ]
    texts.sort(key=lambda text: text_hash(text, 1))
    taken = 0
    for text in texts:
        if taken >= most:
            return
        start = text.find("\n", len(text) // 3) + 1 if len(text) > 2 * EXCERPT else 0
        part = text[start : start + EXCERPT].strip()
        if len(part) < 40:
            continue
        taken += len(part.encode())
        yield part


def language(corpus: Path, name: str) -> list[dict[str, str]]:
    """The records of one language."""
    path = corpus / f"{name}.jsonl.gz"
    present = {record["source"] for _, record in read_records(path)}
    free = [source for source in SOURCES[:-1] if source in present]
    budget = BYTES.get(name, OTHER_BYTES)
    records: list[dict[str, str]] = []
    taken = 0
    for place, source in enumerate(free or SOURCES[-1:]):
        most = (budget - taken) // (len(free or SOURCES[-1:]) - place)
        for part in excerpts(path, source, most):
            records.append({"text": part, "lang": name, "source": source})
            taken += len(part.encode())
    if taken < 0.8 * budget and free:  # a source had too little
        for part in excerpts(path, SOURCES[-1], budget - taken):
            records.append({"text": part, "lang": name, "source": SOURCES[-1]})
    return records


def code() -> list[dict[str, str]]:
    """Excerpts of this repository's files."""
    records = []
    for name in CODE:
        path = ROOT / "src" / "xverse" / name
        text = path.read_text(encoding="utf-8")[: CODE_BYTES // len(CODE)]
        records += [
            {"text": text[start : start + 2 * EXCERPT], "lang": "code", "source": name}
            for start in range(0, len(text), 2 * EXCERPT)
        ]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    records = [record for name in LANGUAGES for record in language(args.corpus, name)] + code()
    # In rounds over the languages, of which the first has all of them.
    places: dict[str, int] = {}
    order = []
    total = {name: sum(record["lang"] == name for record in records) for name in (*LANGUAGES, "code")}
    for record in records:
        place = places[record["lang"]] = places.get(record["lang"], -1) + 1
        order.append((place / total[record["lang"]], record["lang"]))
    records = [record for _, record in sorted(zip(order, records, strict=True), key=lambda item: item[0])]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0, filename="") as file:
        file.write(lines.encode())
    TARGET.parent.mkdir(exist_ok=True)
    with atomic_file(TARGET) as temporary:
        temporary.write_bytes(buffer.getvalue())
    shares = ", ".join(f"{name} {total[name]}" for name in total)
    print(f"{TARGET}: {len(buffer.getvalue()):,} bytes, {len(lines.encode()):,} of text; excerpts: {shares}")


if __name__ == "__main__":
    main()
