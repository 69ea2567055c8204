"""XVERSE's structure, and training it with the ``tokenizers`` library, which holds all texts in memory.

Vocabulary in order: four special tokens, 256 byte tokens, single characters in code-point order, merges.
``counting.py`` and ``recipe.py`` train the same in bounded memory, with compiled code.
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
from xverse.tokenizer.tokenizer import SPACE, SPECIAL_TOKENS, Tokenizer, _scalar

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# One space belongs to the word that follows it; longer runs, tabs and line ends are pieces of their own.
# Metaspace's own splitting would cut "    def" into four pieces, and no merge could ever join indentation.
TRAINING_WORDS = r" ?[^ \t\r\n]+|[\r\n]+|\t+| +(?= [^ \t\r\n])| +"
FIXED = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)  # ids in front of the characters


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
    documents = [_scalar(text) for text in texts]
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
        show_progress=show_progress,
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
    show_progress: bool = False,
) -> list[tuple[str, str]]:
    """The merges that the library's trainer learns; ``others`` are the texts' characters outside the
    alphabet.
    """
    backend = Backend(models.BPE(byte_fallback=True, unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINING_WORDS), "isolated"),
            # The trainer drops characters outside its alphabet and would learn merges across the gap.
            pre_tokenizers.Split(Regex(_one_of({*others, SPACE})), "removed"),
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
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def assemble(alphabet: Sequence[str], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The tokenizer with these characters, in code-point order, and these merges, in the order learnt."""
    tokens = [*SPECIAL_TOKENS, *BYTE_TOKENS, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # Merges of spaces alone come last (see WORDS); the sort is stable.
    ranked = sorted(merges, key=lambda pair: not "".join(pair).strip(SPACE))
    backend = Backend(models.BPE(vocab, ranked, byte_fallback=True, unk_token=SPECIAL_TOKENS[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), *_pieces()]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # The byte tokens are not special: as such the text "<0x41>" would be read as a byte.
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    values: dict[str, Any] = json.loads(backend.to_str())
    return Tokenizer(values)


def default_limit(vocab_size: int, limit_alphabet: int | None) -> int:
    return max(vocab_size - FIXED, 0) // 3 if limit_alphabet is None else limit_alphabet


def choose_alphabet(counts: Mapping[str, int], limit: int, initial: Iterable[str] = "") -> list[str]:
    """The characters that get tokens of their own, in code-point order; the others are left to byte fallback.

    The most frequent ones up to ``limit``, ties by code point; ``initial`` are in it whatever their
    frequency. The library's own choice breaks ties by hash order, which differs from run to run.
    """
    always = {" ", *initial} - {SPACE}
    # A literal ▁ is always written as bytes.
    others = sorted(counts.keys() - always - {SPACE}, key=lambda character: (-counts[character], character))
    kept = always | set(others[: max(limit - len(always), 0)])
    return sorted(kept - {" "} | {SPACE})


def check_room(vocab_size: int, alphabet: Sequence[str]) -> None:
    """Raises UserError where the vocabulary is full before the first merge."""
    if vocab_size <= FIXED + len(alphabet):
        raise UserError(
            f"vocab size {vocab_size} leaves no room for merges: {FIXED} special and byte tokens "
            f"and {len(alphabet)} characters come first"
        )


def check_size(
    vocab_size: int, alphabet: Sequence[str], merges: Sequence[tuple[str, str]], min_frequency: int
) -> None:
    """Raises UserError where the texts gave too few merges."""
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


def _one_of(characters: Iterable[str]) -> str:
    return f"[{''.join(re.escape(character) for character in sorted(characters))}]+"
