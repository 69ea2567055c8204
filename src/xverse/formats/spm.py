"""A vocabulary with which llama.cpp computes our token ids.

GGUF knows no Metaspace BPE. Its ``llama`` tokenizer (SentencePiece) writes spaces as ``▁``, starts from
single characters, joins the neighbours whose text together is a token, best score first and leftmost first,
and writes what is left without a token as bytes. It knows no merge rules and no pre-tokenizer.

*Merge rules.* With minus the rank of a token's last merge as its score, both algorithms join the same pairs,
provided that BPE alone turns every token's text into that token: as long as both have joined the same, the
next pair x, y that SentencePiece joins to a token t covers t's text; BPE on that text alone passes through
the state x, y as well, because no merge reached across its ends; and from there it can only reach t by the
rule (x, y), whose rank is t's score. Tokens that their text does not lead to are hidden from SentencePiece.

*Pre-tokenizer.* Cuts around digits, punctuation, line ends and before spaces lie between characters that no
reachable token contains side by side, so nothing is ever joined across them. In the layout of
``tokenizer/train.py`` a run of spaces stands before its word uncut, and merges of spaces alone come last, so
that the word takes its space first; the scores say the same. Only a ``▁`` in the text itself differs: we
write its bytes, llama.cpp reads a space.
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


class Kind(IntEnum):
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
    kinds: list[Kind]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def spm_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of ``tokenizer``, filled up with unused entries to the model's ``size``.

    Raises UserError where a byte has no token: llama.cpp ends with an exception at the first character that
    it would have to write in bytes.
    """
    model = tokenizer.values["model"]
    special = tokenizer.special_ids
    added = {token["id"]: token["content"] for token in tokenizer.values.get("added_tokens") or []}
    texts = {index: text for text, index in model["vocab"].items()} | added
    if not model.get("byte_fallback") or len(tokenizer.byte_ids) < 256:
        raise UserError(
            "this tokenizer has no tokens for bytes, which llama.cpp needs for characters outside the "
            "vocabulary; export as hf or llama instead"
        )
    tokens, kinds = [], []
    for index in range(size):
        text = texts.get(index)
        if text is None:
            text, kind = f"[UNUSED_{index}]", Kind.UNUSED
        elif index == tokenizer.unk_id:
            kind = Kind.UNKNOWN
        elif index in special:
            kind = Kind.CONTROL
        elif index in added:
            kind = Kind.USER_DEFINED
        elif index in tokenizer.byte_ids:
            text, kind = text.upper().replace("X", "x"), Kind.BYTE
        else:
            kind = Kind.NORMAL
        tokens.append(text)
        kinds.append(kind)
    scores = [0.0] * size
    ranks = _ranks(model)
    reached = _reached(tokenizer, tokens, kinds)
    for index, text in enumerate(tokens):
        if kinds[index] is Kind.NORMAL and len(text) > 1:
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
    """The ids that llama.cpp computes for ``text`` without special tokens (``llm_tokenizer_spm``)."""
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
    """How many of so many random texts, eight tokens each, get other ids from llama.cpp than from us."""
    chosen = random.Random(0)
    ordinary = [index for index, kind in enumerate(vocabulary.kinds) if kind is Kind.NORMAL]
    different = 0
    for _ in range(texts):
        text = tokenizer.decode(chosen.choices(ordinary, k=8))
        different += spm_encode(vocabulary, text) != tokenizer.encode(text)
    return different


def _ranks(model: dict[str, Any]) -> dict[tuple[str, str], int]:
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[left, right] = rank
    return ranks


def _last_rank(text: str, ranks: dict[tuple[str, str], int]) -> int | None:
    """The rank of the merge that completes ``text``, or None where merging its characters does not."""
    parts, last = list(text), None
    while len(parts) > 1:
        found = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(parts)]
        last = min(found)
        if last == len(ranks):
            return None
        at = found.index(last)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return last


def _reached(tokenizer: Tokenizer, tokens: list[str], kinds: list[Kind]) -> set[int]:
    """Ids of the normal tokens whose text, pre-tokenizer and all, is encoded as just that token."""
    normal = [index for index, kind in enumerate(kinds) if kind is Kind.NORMAL]
    encoded = tokenizer.encode_batch([tokens[index].replace(SPACE, " ") for index in normal])
    return {index for index, ids in zip(normal, encoded, strict=True) if ids == [index]}


def _hide(tokens: list[str], kinds: list[Kind], reached: set[int]) -> None:
    """Rewrite the tokens that SentencePiece could form and our tokenizer never does.

    A plain space never stands in the text that it looks for and reads the same as ``▁`` in what it prints.
    """
    known = {tokens[index] for index in reached}

    def formable(text: str) -> bool:
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        return any(all(len(part) == 1 or part in known for part in parts) for parts in cuts)

    for index, text in enumerate(tokens):
        if kinds[index] is Kind.NORMAL and index not in reached and formable(text):
            if SPACE in text:
                tokens[index] = text.replace(SPACE, " ")
            else:
                tokens[index], kinds[index] = f"[UNREACHED_{index}]", Kind.UNUSED


def _write_nul_as_byte(tokens: list[str], kinds: list[Kind]) -> None:
    """U+0000 ends a string in llama.cpp, so its token takes the place of the byte token, which it frees."""
    for index, text in enumerate(tokens):
        if text == "\0":
            byte = tokens.index("<0x00>")
            tokens[byte], kinds[byte] = f"[UNUSED_{byte}]", Kind.UNUSED
            tokens[index], kinds[index] = "<0x00>", Kind.BYTE
        elif "\0" in text:
            tokens[index], kinds[index] = f"[UNREACHED_{index}]", Kind.UNUSED
