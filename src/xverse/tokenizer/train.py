"""Train a tokenizer of XVERSE's structure with the ``tokenizers`` library.

Vocabulary in order: four special tokens, 256 byte tokens, single characters in code-point order, merges.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from xverse.config import UserError
from xverse.tokenizer.tokenizer import SPACE, SPECIAL_TOKENS, Tokenizer, _scalar

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# One space belongs to the word that follows it; longer runs, tabs and line ends are pieces of their own.
# Metaspace's own splitting would cut "    def" into four pieces, and no merge could ever join indentation.
TRAINING_WORDS = r" ?[^ \t\r\n]+|[\r\n]+|\t+| +(?= [^ \t\r\n])| +"
# For encoding, merges of spaces alone come last instead, so that the word takes its space before the run
# closes up: the same, but without a rule that only this pre-tokenizer can express (formats/spm.py).
WORDS = r" *[^ \t\r\n]+|[\r\n]+|\t+| +"


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_frequency: int = 2,
    limit_alphabet: int | None = None,
    initial_characters: str = "",
    max_token_length: int = 16,
    show_progress: bool = False,
) -> Tokenizer:
    """BPE with byte fallback from ``texts``; exactly ``vocab_size`` entries; the same texts, the same result.

    ``limit_alphabet`` bounds the single characters (the most frequent win; default a third of the
    vocabulary); rarer ones are written as bytes. ``initial_characters`` are in the alphabet whatever their
    frequency. ``max_token_length`` is in characters: longer merges only fit the text that they came from.
    Holds the texts in memory. Raises UserError where the corpus does not give enough merges.
    """
    fixed = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)
    if limit_alphabet is None:
        limit_alphabet = max(vocab_size - fixed, 0) // 3
    documents = [_scalar(text) for text in texts]
    alphabet, rare = choose_alphabet(documents, limit_alphabet, initial_characters)
    if vocab_size <= fixed + len(alphabet):
        raise UserError(
            f"vocab size {vocab_size} leaves no room for merges: {fixed} special and byte tokens "
            f"and {len(alphabet)} characters come first"
        )
    backend = Backend(models.BPE(byte_fallback=True, unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINING_WORDS), "isolated"),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *BYTE_TOKENS],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=max_token_length,
        show_progress=show_progress,
    )
    backend.train_from_iterator(_pieces(documents, rare), trainer)
    size = backend.get_vocab_size()
    if size != vocab_size:
        raise UserError(
            f"the corpus is too small: it gives {size} entries ({len(alphabet)} characters and "
            f"{size - fixed - len(alphabet)} merges), not {vocab_size}; add text, lower the vocabulary "
            f"size or min_frequency (now {min_frequency})"
        )
    values: dict[str, Any] = json.loads(backend.to_str())
    # The trainer made the byte tokens special; as such the text "<0x41>" would be read as a byte.
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < len(SPECIAL_TOKENS)]
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = WORDS
    values["model"]["merges"].sort(key=lambda pair: not "".join(pair).strip(SPACE))  # stable
    return Tokenizer(values)


def choose_alphabet(documents: list[str], limit: int, initial: str = "") -> tuple[list[str], str]:
    """The characters that get tokens of their own, in code-point order, and those left to byte fallback.

    The library's own choice breaks ties by hash order, which differs from run to run.
    """
    counts: Counter[str] = Counter()
    for text in documents:
        counts.update(text)
    counts.pop(SPACE, None)  # always written as bytes
    always = {" ", *initial} - {SPACE}
    others = sorted(counts.keys() - always, key=lambda character: (-counts[character], character))
    kept = always | set(others[: max(limit - len(always), 0)])
    rare = "".join(sorted(counts.keys() - kept)) + SPACE
    return sorted(kept - {" "} | {SPACE}), rare


def _pieces(documents: list[str], rare: str) -> Iterator[str]:
    # The trainer drops characters outside its alphabet and would learn merges across the gap.
    cut = re.compile(f"[{re.escape(rare)}]+")
    for text in documents:
        yield from (piece for piece in cut.split(text) if piece)
