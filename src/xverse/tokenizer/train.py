"""The structure of XVERSE's tokenizer, and training it with the ``tokenizers`` library, all texts in memory.

The vocabulary in order: four special tokens, 256 byte tokens, single characters by code point, merges.
``counting.py`` and ``recipe.py`` train the same tokenizer in bounded memory, with compiled code.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from xverse.config import UserError
from xverse.tokenizer.encoder import WORDS
from xverse.tokenizer.tokenizer import SPACE, SPECIAL_TOKENS, Tokenizer, replace_surrogates

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# One space belongs to the word that follows it; longer runs, tabs and line ends are separate pieces.
# Metaspace's splitting would cut "    def" into four pieces, so that no merge could join indentation.
TRAINING_WORDS = r" ?[^ \t\r\n]+|[\r\n]+|\t+| +(?= [^ \t\r\n])| +"
FIXED = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)  # ids before the characters


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_frequency: int = 2,
    limit_alphabet: int | None = None,
    initial_characters: str = "",
    max_token_length: int = 16,
) -> Tokenizer:
    """Train BPE with byte fallback and exactly ``vocab_size`` entries; deterministic.

    ``limit_alphabet`` limits the single characters to the most frequent (default: a third of the vocabulary);
    others are encoded as bytes. ``initial_characters`` are always in the alphabet. ``max_token_length`` is in
    characters: longer merges would only fit the text that they came from. Holds the texts in memory. Raises
    UserError if the texts do not give enough merges.
    """
    documents = [replace_surrogates(text) for text in texts]
    counts: Counter[str] = Counter()
    for text in documents:
        counts.update(text)
    alphabet = choose_alphabet(counts, default_limit(vocab_size, limit_alphabet), initial_characters)
    check_room(vocab_size, alphabet)
    merges = library_merges(
        documents,
        vocab_size,
        alphabet,
        counts.keys() - set(alphabet) - {" "},
        min_frequency=min_frequency,
        max_token_length=max_token_length,
    )
    check_size(vocab_size, alphabet, merges, min_frequency)
    return assemble(alphabet, merges)


def library_merges(
    texts: Iterable[str],
    vocab_size: int,
    alphabet: Sequence[str],
    others: Iterable[str],
    *,
    min_frequency: int = 2,
    max_token_length: int = 16,
) -> list[tuple[str, str]]:
    """The merges that the library's trainer learns; ``others``: characters outside the alphabet."""
    outside = "".join(map(re.escape, sorted({*others, SPACE})))
    backend = Backend(models.BPE(byte_fallback=True, unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINING_WORDS), "isolated"),
            # The trainer drops characters outside its alphabet and would learn merges across the gap.
            pre_tokenizers.Split(Regex(f"[{outside}]+"), "removed"),
            *_pieces(),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *BYTE_TOKENS],
        initial_alphabet=list(alphabet),
        limit_alphabet=len(alphabet),
        max_token_length=max_token_length,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def assemble(alphabet: Sequence[str], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The tokenizer with these characters, by code point, and these merges, in the order learnt."""
    tokens = [*SPECIAL_TOKENS, *BYTE_TOKENS, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # Merges of spaces alone come last (see WORDS); the sort is stable.
    ranked = sorted(merges, key=lambda pair: not "".join(pair).strip(SPACE))
    return Tokenizer(tokenizer_values(vocab, ranked))


def tokenizer_values(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The mapping of a tokenizer.json of XVERSE's structure."""
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), *_pieces()]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # The byte tokens are not special; otherwise the text "<0x41>" would be read as a byte.
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    values: dict[str, Any] = json.loads(backend.to_str())
    return values


def default_limit(vocab_size: int, limit_alphabet: int | None) -> int:
    """The maximum number of single characters."""
    return max(vocab_size - FIXED, 0) // 3 if limit_alphabet is None else limit_alphabet


def choose_alphabet(counts: Mapping[str, int], limit: int, initial: Iterable[str] = "") -> list[str]:
    """The characters that become tokens, by code point; others are left to byte fallback.

    ``initial``, then the most frequent up to ``limit``, ties by code point. (The library breaks ties by hash
    order, which differs between runs.)
    """
    always = {" ", *initial} - {SPACE}
    # A literal ▁ is always written as bytes.
    others = sorted(counts.keys() - always - {SPACE}, key=lambda character: (-counts[character], character))
    kept = always | set(others[: max(limit - len(always), 0)])
    return sorted(kept - {" "} | {SPACE})


def check_room(vocab_size: int, alphabet: Sequence[str]) -> None:
    """Raise UserError if the vocabulary is full before the first merge."""
    if vocab_size <= FIXED + len(alphabet):
        raise UserError(
            f"vocab size {vocab_size} leaves no room for merges: {FIXED} special and byte tokens "
            f"and {len(alphabet)} characters come first"
        )


def check_size(
    vocab_size: int, alphabet: Sequence[str], merges: Sequence[tuple[str, str]], min_frequency: int
) -> None:
    """Raise UserError if the texts gave too few merges."""
    new = len({"".join(pair) for pair in merges})
    size = FIXED + len(alphabet) + new
    if size != vocab_size:
        raise UserError(
            f"the corpus is too small: it gives {size} entries ({len(alphabet)} characters and "
            f"{new} merges), not {vocab_size}; add text, lower the vocabulary "
            f"size or min_frequency (now {min_frequency})"
        )


def _pieces() -> list[Any]:
    return [
        pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Punctuation("isolated"),
    ]
