"""``xverse tokenizer train``, ``repair`` and ``report``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xverse.data.corpus import CorpusReport
    from xverse.tokenizer import Tokenizer

_FILES = "text files (.txt) or JSON lines with a text field (.jsonl, .jsonl.gz)"
_BLOCK = 1 << 16  # bytes of a .txt file that make one document, cut at a line end


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|repair|report")
    train = actions.add_parser("train", help="train a tokenizer of XVERSE's structure")
    train.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="entries in all, exactly")
    train.add_argument("--limit-alphabet", type=int, metavar="N", help="single characters at most")
    train.add_argument("--initial-characters", default="", metavar="TEXT", help="characters to keep always")
    train.add_argument("--min-frequency", type=int, default=2, metavar="N", help="a merge's occurrences")
    train.add_argument("files", nargs="+", metavar="FILE", help=_FILES)
    repair = actions.add_parser("repair", help="mend a tokenizer.json that current libraries refuse")
    repair.add_argument("source", metavar="IN", help="tokenizer.json or model directory")
    repair.add_argument("target", metavar="OUT", help="file or directory to write")
    report = actions.add_parser("report", help="compression, byte fallback and round trip on text")
    report.add_argument("--tokenizer", required=True, metavar="DIR", help="directory or tokenizer.json")
    report.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    report.add_argument("files", nargs="+", metavar="FILE", help=_FILES)


def run(args: argparse.Namespace) -> int:
    return {"train": _train, "repair": _repair, "report": _report}[args.action](args)


def _train(args: argparse.Namespace) -> int:
    from xverse.config import UserError
    from xverse.log import notice
    from xverse.tokenizer import train_tokenizer

    _check_files(args.files)
    if args.limit_alphabet is not None and args.limit_alphabet < 0:
        raise UserError(f"--limit-alphabet {args.limit_alphabet}: must not be negative")
    _check_writable(Path(args.out))
    tokenizer = train_tokenizer(
        _all_texts(args.files),
        args.vocab_size,
        min_frequency=args.min_frequency,
        limit_alphabet=args.limit_alphabet,
        initial_characters=args.initial_characters,
    )
    tokenizer.save(args.out)
    notice(f"{tokenizer.vocab_size} entries, hash {tokenizer.hash}")
    print(args.out)
    return 0


def _repair(args: argparse.Namespace) -> int:
    from xverse.tokenizer import repair_file

    changed = repair_file(args.source, args.target)
    print(f"{args.target}: {'repaired' if changed else 'nothing needed repair; copied'}")
    return 0


@dataclass
class FileReport:
    """What one file gives. ``byte_fallback`` is the share of tokens that are single bytes."""

    file: str
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    tokens: int = 0
    fallback_tokens: int = 0
    round_trip: bool = True

    @property
    def rates(self) -> dict[str, float]:
        tokens = max(1, self.tokens)
        return {
            "bytes_per_token": round(self.bytes / tokens, 4),
            "characters_per_token": round(self.characters / tokens, 4),
            "byte_fallback": round(self.fallback_tokens / tokens, 6),
        }


def _report(args: argparse.Namespace) -> int:
    import json

    from rich.console import Console
    from rich.table import Table

    from xverse.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    _check_files(args.files)
    rows = [_measure(tokenizer, name) for name in args.files]
    if args.json:
        files = [{**asdict(row), **row.rates} for row in rows]
        head = {"tokenizer": args.tokenizer, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
        print(json.dumps({**head, "files": files}, ensure_ascii=False))
    else:
        table = Table(box=None, pad_edge=False)
        table.add_column("file", overflow="fold")
        for column in ("bytes", "tokens", "bytes/token", "chars/token", "byte fallback", "round trip"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            rates = row.rates
            table.add_row(
                row.file,
                f"{row.bytes:,}",
                f"{row.tokens:,}",
                f"{rates['bytes_per_token']:.2f}",
                f"{rates['characters_per_token']:.2f}",
                f"{rates['byte_fallback']:.2%}",
                "ok" if row.round_trip else "LOST",
            )
        Console(highlight=False, markup=False).print(table)
    return 0 if all(row.round_trip for row in rows) else 1


def _measure(tokenizer: Tokenizer, name: str) -> FileReport:
    row = FileReport(name)
    for batch in _batches(_all_texts([name]), 256):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            row.documents += 1
            row.bytes += len(text.encode())
            row.characters += len(text)
            row.tokens += len(ids)
            row.fallback_tokens += sum(index in tokenizer.byte_ids for index in ids)
            row.round_trip = row.round_trip and tokenizer.decode(ids) == text
    return row


def _check_files(names: list[str]) -> None:
    from xverse.config import UserError

    for name in names:
        if not Path(name).is_file():
            raise UserError(f"{name}: {'is a directory' if Path(name).is_dir() else 'no such file'}")
        if not os.access(name, os.R_OK):
            raise UserError(f"{name}: cannot be read (no permission)")
        if not name.endswith((".txt", ".jsonl", ".jsonl.gz")):
            raise UserError(f"{name}: expected a .txt, .jsonl or .jsonl.gz file")


def _check_writable(directory: Path) -> None:
    """What cannot be written should be known before minutes of training, not after. Leaves nothing behind."""
    from xverse.config import UserError

    standing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not standing.is_dir():
        raise UserError(f"{directory}: cannot be written ({standing} is a file)")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise UserError(f"{directory}: cannot be written (no permission in {standing})")


def _all_texts(names: list[str]) -> Iterator[str]:
    """The texts of the files; bad lines are skipped, counted and told. Raises UserError if none is left."""
    from xverse.config import UserError
    from xverse.data.corpus import CorpusReport, read_documents
    from xverse.log import notice

    for name in names:
        report = CorpusReport()
        if name.endswith(".txt"):
            yield from _text_file(name, report)
        else:
            yield from (document.text for document in read_documents(name, report))
        if report.describe():
            notice(f"{name}: {report.describe()}")
        if not report.read:
            raise UserError(f"{name}: no usable text in this file")


def _text_file(name: str, report: CorpusReport) -> Iterator[str]:
    block: list[str] = []
    size = 0
    with Path(name).open("rb") as stream:
        for line in stream:
            try:
                block.append(line.decode("utf-8"))
            except UnicodeDecodeError:
                report.bad_utf8 += 1
                continue
            report.read += 1
            size += len(line)
            if size >= _BLOCK:
                yield "".join(block)
                block, size = [], 0
    if block:
        yield "".join(block)


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
