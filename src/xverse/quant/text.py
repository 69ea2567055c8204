"""Calibration text for quantisation, and the text on which parity is measured."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
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
LARGE_CALIBRATION_TOKENS = 8192  # of the package's text, for models of more than a billion parameters
_LENGTH = 128  # of rows of the package's text: many short rows know more languages than a few long ones
_LOADING_TOKENS = 512  # while loading: enough for the magnitude of each channel
_LOADING_CHARACTERS = 300  # of each text
_READ = 4 * CALIBRATION_TOKENS  # characters of a long file that are encoded, spread evenly
_SMALLEST = 256  # tokens; fewer are not representative of a layer's inputs
_BYTE_SHARE = 0.3  # of tokens that are single bytes
_LEAST_OVERLAP = 0.1  # of scripts with the parity text
_PARITY_LENGTH = 128
_PARITY_TOKENS_LARGE = 256  # for models of more than a billion parameters


def calibration_tokens(tokenizer: Tokenizer, file: str | Path) -> Tensor:
    """Rows int64 [n, T] of a text file or of the texts of a ``.jsonl`` file, also compressed: at most 65,536
    tokens, taken evenly from the whole file.

    Prints a notice if more than 30 % of the tokens are single bytes, as in a language unknown to the
    tokenizer, or if the letters' scripts overlap by less than 10 % with those of the parity text. (Languages
    of one script are not distinguished.) Raises UserError for a file that cannot be read, is not UTF-8, has a
    line without ``text``, or fewer than 256 tokens.
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
    share = sum(token in tokenizer.byte_ids for token in ids) / len(ids)
    if share > _BYTE_SHARE:
        notice(
            f"{path}: {share:.0%} of its tokens are single bytes, so the vocabulary lacks its language; "
            "calibration text should resemble what the model is used for"
        )
    return _evenly(_rows(ids, CALIBRATION_LENGTH), CALIBRATION_TOKENS)


def default_calibration(tokenizer: Tokenizer, parameters: int) -> Tensor:
    """Rows int64 [n, 128] of the package's calibration text in 41 languages and code: at most 65,536 tokens,
    for a model of more than a billion ``parameters`` 8,192. The texts take turns: the first rows of all,
    in which every language occurs, come before the second."""
    texts = [_rows(tokenizer.encode(text), _LENGTH) for text in _calibration_texts()]
    turns = itertools.zip_longest(*(text for text in texts if text.shape[1] == _LENGTH))
    rows = torch.stack([row for turn in turns for row in turn if row is not None])
    tokens = LARGE_CALIBRATION_TOKENS if parameters > 10**9 else CALIBRATION_TOKENS
    return rows[: tokens // _LENGTH]


def loading_calibration(tokenizer: Tokenizer) -> Tensor:
    """Rows int64 [4, 128] of the same text, for a model that is quantised while it is loaded."""
    ids: list[int] = []
    for text in _calibration_texts():
        ids += tokenizer.encode(text[:_LOADING_CHARACTERS])
    return _evenly(_rows(ids, _LENGTH), _LOADING_TOKENS)


def _calibration_texts() -> list[str]:
    with importlib.resources.as_file(
        importlib.resources.files("xverse") / "assets" / "calibration"
    ) as folder:
        return load_texts(folder / "text.jsonl.gz")


def parity_tokens(tokenizer: Tokenizer, parameters: int) -> Tensor:
    """Rows int64 [n, T] of the package's passages in thirteen languages and code, T = 128; for a model of
    more than a billion ``parameters`` only 256 tokens of them, T = 64."""
    ids = tokenizer.encode(_parity_text())
    if parameters > 10**9:
        return _evenly(_rows(ids, _PARITY_LENGTH // 2), _PARITY_TOKENS_LARGE)
    return _rows(ids, _PARITY_LENGTH)


def _parity_text() -> str:
    return (importlib.resources.files("xverse") / "assets" / "parity.txt").read_text(encoding="utf-8")


def _spread(texts: list[str]) -> list[str]:
    """At most about ``_READ`` characters, in pieces spread evenly, because encoding takes time."""
    length = sum(map(len, texts))
    if length <= _READ:
        return texts
    pieces = [text[start : start + 4096] for text in texts for start in range(0, len(text), 4096)]
    step = length / _READ
    return [pieces[int(index * step)] for index in range(int(len(pieces) / step))]


def _warn_of_scripts(path: Path, texts: list[str]) -> None:
    shares, known = _scripts("".join(texts)[: 1 << 20]), _scripts(_parity_text())
    if (
        shares
        and sum(min(share, known.get(script, 0.0)) for script, share in shares.items()) < _LEAST_OVERLAP
    ):
        most = max(shares, key=shares.__getitem__)
        notice(
            f"{path}: is written in {most.title()} letters, unlike most text; a model calibrated on it may "
            "lose more in other languages"
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
    """``LATIN``, ``CJK``, ``CYRILLIC`` …: the first word of the letter's Unicode name."""
    return unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]


def _rows(ids: list[int] | Tensor, length: int) -> Tensor:
    """Rows int64 [n, T] of at most ``length`` tokens, without an incomplete last row."""
    length = min(length, len(ids))
    if not length:
        raise UserError("the tokenizer makes no tokens of the calibration text")
    return torch.as_tensor(ids[: len(ids) // length * length]).view(-1, length)


def resized(rows: Tensor, tokens: int, length: int) -> Tensor:
    """At most ``tokens`` tokens of ``rows`` int64 [n, T], taken evenly, as rows of ``length``."""
    return _evenly(_rows(rows.flatten(), length), tokens)


def _evenly(rows: Tensor, tokens: int) -> Tensor:
    """At most ``tokens`` tokens, as rows taken evenly from ``rows``, int64 [n, T]."""
    most = max(1, tokens // rows.shape[1])
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]
