"""Text for quantising: what calibration learns from, and what the parity figures are measured on."""

from __future__ import annotations

import functools
import importlib.resources
import unicodedata
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.log import notice
from xverse.texts import load_texts
from xverse.tokenizer import Tokenizer

CALIBRATION_TOKENS = 65_536
CALIBRATION_LENGTH = 512
_READ = 4 * CALIBRATION_TOKENS  # characters of a long file that are encoded, spread over it
_SMALLEST = 256  # tokens; fewer say nothing of a layer's inputs
_SPELT_SHARE = 0.3  # of tokens that are single bytes
_LEAST_OVERLAP = 0.1  # of scripts with the parity text
_PARITY_LENGTH = 128
_PARITY_TOKENS_LARGE = 256  # where a forward pass of one token takes billions of multiplications


def calibration_tokens(tokenizer: Tokenizer, file: str | Path) -> Tensor:
    """Rows int64 [n, T] of a text file or of the texts of a ``.jsonl``, also gzipped: at most 65,536 tokens,
    taken evenly from all of it.

    Says so where more than 30 % of the tokens are single bytes, as with a language that the tokenizer has not
    learnt, or where the letters' scripts overlap by less than 10 % with those of the parity text. Languages
    of one script are not told apart. Raises UserError for a file that cannot be read, is no UTF-8, has no
    ``text`` in a line, or holds fewer than 256 tokens.
    """
    path = Path(file)
    texts = _spread(load_texts(path))
    _warn_of_scripts(path, texts)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
    if len(ids) < _SMALLEST:
        raise UserError(
            f"{path}: {len(ids)} tokens of calibration text are too few; give at least {_SMALLEST}"
        )
    spelt = sum(token in tokenizer.byte_ids for token in ids) / len(ids)
    if spelt > _SPELT_SHARE:
        notice(
            f"{path}: {spelt:.0%} of its tokens are single bytes, so the model hardly knows its language; "
            "calibration text should be what the model is used for"
        )
    return _evenly(_rows(ids, CALIBRATION_LENGTH), CALIBRATION_TOKENS)


def parity_tokens(tokenizer: Tokenizer, parameters: int) -> Tensor:
    """Rows int64 [n, 128] of passages in thirteen languages and code that come with the package; 256 tokens
    of them, taken evenly, for a model of more than a billion ``parameters``."""
    ids = tokenizer.encode(_parity_text())
    if parameters > 10**9:
        return _evenly(_rows(ids, _PARITY_LENGTH // 2), _PARITY_TOKENS_LARGE)
    return _rows(ids, _PARITY_LENGTH)


def _parity_text() -> str:
    return (importlib.resources.files("xverse") / "assets" / "parity.txt").read_text(encoding="utf-8")


def _spread(texts: list[str]) -> list[str]:
    """About ``_READ`` characters of more than those, in pieces from everywhere: encoding takes time."""
    length = sum(map(len, texts))
    if length <= _READ:
        return texts
    pieces = [text[start : start + 4096] for text in texts for start in range(0, len(text), 4096)]
    step = length / _READ
    return [pieces[int(index * step)] for index in range(int(len(pieces) / step))]


def _warn_of_scripts(path: Path, texts: list[str]) -> None:
    found, known = _scripts("".join(texts)[: 1 << 20]), _scripts(_parity_text())
    if found and sum(min(share, known.get(script, 0.0)) for script, share in found.items()) < _LEAST_OVERLAP:
        most = max(found, key=found.__getitem__)
        notice(
            f"{path}: is written in {most.title()} letters, unlike most of what the model is used for; a "
            "model that is calibrated on it may lose more in other languages"
        )


def _scripts(text: str) -> dict[str, float]:
    """The share of each script among the letters of a text."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            counts[_script(character)] += count
    total = sum(counts.values())
    return {script: count / total for script, count in counts.items()}


@functools.cache
def _script(letter: str) -> str:
    """``LATIN``, ``CJK``, ``CYRILLIC`` …: how the names of its letters begin."""
    return unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]


def _rows(ids: list[int], length: int) -> Tensor:
    """Rows int64 [n, T] of at most ``length`` tokens; the rest that fills no row is left out."""
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _evenly(rows: Tensor, tokens: int) -> Tensor:
    """At most ``tokens`` tokens of ``rows``, from beginning to end."""
    most = max(1, tokens // rows.shape[1])
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]
