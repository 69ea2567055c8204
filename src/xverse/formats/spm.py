"""A vocabulary from which llama.cpp computes the same token ids as XVERSE's tokenizer.

GGUF has no Metaspace BPE. Its ``llama`` tokenizer (SentencePiece) writes spaces as ``▁``, starts from single
characters, merges adjacent pieces whose joined text is a token (best score first, then leftmost) and writes
remaining text without a token as bytes. It has neither merge rules nor a pre-tokenizer.

*Merge rules.* Let the score of a token be minus the rank of its last merge. Both algorithms then merge the
same pairs, provided that BPE alone turns every token's text into that token. Suppose both have made the same
merges so far. The next pair x, y that SentencePiece merges into a token t covers t's text. BPE on that text
alone passes through the state x, y too, because no merge crossed its ends, and from there reaches t only by
the rule (x, y), whose rank is t's score. Tokens that BPE does not produce from their own text are hidden from
SentencePiece.

*Pre-tokenizer.* It splits around digits, punctuation and line ends and before spaces, between characters that
no reachable token contains next to each other, so nothing is merged across a split. In the layout of
``tokenizer/train.py`` a run of spaces precedes its word unsplit, and merges of spaces alone rank last, so a
word takes its space first; the scores preserve this. Only a literal ``▁`` in the text differs: XVERSE encodes
its bytes, llama.cpp a space.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

from xverse.config import UserError
from xverse.tokenizer import Tokenizer
from xverse.tokenizer.tokenizer import SPACE


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """``tokenizer.ggml.tokens``, ``scores`` and ``token_type``, by id; texts are unique."""

    tokens: list[str]
    scores: list[float]
    kinds: list[TokenType]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def spm_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of ``tokenizer``, padded with unused entries to the model's ``size``.

    Raises UserError if a byte has no token: llama.cpp throws an exception at the first character that it has
    to encode as bytes.
    """
    model = tokenizer.values["model"]
    special = tokenizer.special_ids
    added = {token["id"]: token["content"] for token in tokenizer.values.get("added_tokens") or []}
    texts = {index: text for text, index in model["vocab"].items()} | added
    if not model.get("byte_fallback") or len(tokenizer.byte_ids) < 256:
        raise UserError(
            "this tokenizer has no byte tokens, which llama.cpp needs for characters outside the vocabulary; "
            "export with --format hf or llama"
        )
    tokens, kinds = [], []
    for index in range(size):
        text = texts.get(index)
        if text is None:
            text, kind = f"[UNUSED_{index}]", TokenType.UNUSED
        elif index == tokenizer.unk_id:
            kind = TokenType.UNKNOWN
        elif index in special:
            kind = TokenType.CONTROL
        elif index in added:
            kind = TokenType.USER_DEFINED
        elif index in tokenizer.byte_ids:
            text, kind = text.upper().replace("X", "x"), TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        kinds.append(kind)
    scores = [0.0] * size
    ranks = _ranks(model)
    reached = _reached(tokenizer, tokens, kinds)
    for index, text in enumerate(tokens):
        if kinds[index] is TokenType.NORMAL and len(text) > 1:
            rank = _last_rank(text, ranks) if index in reached else None
            if rank is None:
                reached.discard(index)
            else:
                scores[index] = -float(rank)
    _hide(tokens, kinds, reached)
    _write_nul_as_byte(tokens, kinds)
    assert len(set(tokens)) == size
    return Vocabulary(tokens, scores, kinds)


def spm_encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """The ids that llama.cpp computes for ``text``, without special tokens (its ``llm_tokenizer_spm``)."""
    parts: list[str] = list(text.replace(" ", SPACE))
    before = list(range(-1, len(parts) - 1))
    after = [*range(1, len(parts)), -1]
    queue: list[tuple[float, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            index = vocabulary.ids.get(parts[left] + parts[right])
            if index is not None:
                size = len(parts[left]) + len(parts[right])
                heapq.heappush(queue, (-vocabulary.scores[index], left, right, size))

    for left in range(len(parts) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, size = heapq.heappop(queue)
        if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != size:
            continue
        parts[left] += parts[right]
        parts[right] = ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    result: list[int] = []
    for part in filter(None, parts):
        index = vocabulary.ids.get(part)
        result += (
            [index] if index is not None else [vocabulary.ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        )
    return result


def random_differences(tokenizer: Tokenizer, vocabulary: Vocabulary, texts: int = 2000) -> int:
    """For how many of ``texts`` random texts of eight tokens llama.cpp's ids differ from ``tokenizer``'s."""
    chosen = random.Random(0)
    ordinary = [index for index, kind in enumerate(vocabulary.kinds) if kind is TokenType.NORMAL]
    first = tokenizer.backend.encode("a", add_special_tokens=False).tokens[0]
    space = " " if first.startswith(SPACE) else ""  # that precedes a text
    different = 0
    for _ in range(texts):
        text = tokenizer.decode(chosen.choices(ordinary, k=8))
        different += spm_encode(vocabulary, space + text) != tokenizer.encode(text)
    return different


def _ranks(model: dict[str, Any]) -> dict[tuple[str, str], int]:
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[left, right] = rank
    return ranks


def _last_rank(text: str, ranks: dict[tuple[str, str], int]) -> int | None:
    """The rank of the last merge in BPE on ``text``, or None if BPE does not merge it into one token."""
    parts, last = list(text), None
    while len(parts) > 1:
        candidates = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(parts)]
        last = min(candidates)
        if last == len(ranks):
            return None
        at = candidates.index(last)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return last


def _reached(tokenizer: Tokenizer, tokens: list[str], kinds: list[TokenType]) -> set[int]:
    """Ids of the normal tokens whose text the whole tokenizer encodes as just that token."""
    normal = [index for index, kind in enumerate(kinds) if kind is TokenType.NORMAL]
    encoded = tokenizer.encode_batch([tokens[index].replace(SPACE, " ") for index in normal])
    return {index for index, ids in zip(normal, encoded, strict=True) if ids == [index]}


def _hide(tokens: list[str], kinds: list[TokenType], reached: set[int]) -> None:
    """Rewrite the tokens that SentencePiece could form and BPE never does.

    SentencePiece's input has no plain spaces, so a token with one never matches, and prints the same as
    ``▁``.
    """
    known = {tokens[index] for index in reached}

    def formable(text: str) -> bool:
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        return any(all(len(part) == 1 or part in known for part in parts) for parts in cuts)

    for index, text in enumerate(tokens):
        if kinds[index] is TokenType.NORMAL and index not in reached and formable(text):
            if SPACE in text:
                tokens[index] = text.replace(SPACE, " ")
            else:
                tokens[index], kinds[index] = f"[UNREACHED_{index}]", TokenType.UNUSED


def _write_nul_as_byte(tokens: list[str], kinds: list[TokenType]) -> None:
    """Turn the token of U+0000, which ends a string in llama.cpp, into the byte token ``<0x00>``."""
    for index, text in enumerate(tokens):
        if text == "\0":
            byte = tokens.index("<0x00>")
            tokens[byte], kinds[byte] = f"[UNUSED_{byte}]", TokenType.UNUSED
            tokens[index], kinds[index] = "<0x00>", TokenType.BYTE
        elif "\0" in text:
            tokens[index], kinds[index] = f"[UNREACHED_{index}]", TokenType.UNUSED
