"""Language identification with py3langid, whose model is part of the package, among a recipe's languages.

It was chosen over lingua and fastText's lid.176 by accuracy and speed on 41 languages (benchmarks/data.md).
It confuses Malay and Indonesian, which words used in only one of them tell apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from xverse.config import need

_NAMES = (
    "ar bg ca cs da de el en es et fa fi fr he hi hu id it ja kk ko lt lv mr ms nl no pl pt ro ru sk sl "
    "sr sv ta th tr uk vi zh"
)
LANGUAGES = tuple(_NAMES.split())
SAMPLE = 2_000  # characters examined, from the beginning, the middle and the end
_SPELT_AS = {"nb": "no", "nn": "no"}
# Code, addresses and markup, which look English in every language.
_NOISE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+|\]\([^)\n]*\)|<[^>\n]{1,200}>|[\w./\\-]+\.[a-z]{2,5}\b",
    re.S,
)
_WORD = re.compile(r"[a-z]{3,}")


@dataclass
class LanguageStage:
    """Drops documents in other ``languages``, those identified with less than ``min_confidence``, and those
    whose declared language differs from the detected one (``mismatch``: drop or relabel).
    """

    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))
    min_confidence: float = 0.5
    mismatch: Literal["drop", "relabel"] = "drop"

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence {self.min_confidence} is not between 0 and 1")
        unknown = sorted(set(self.languages) - known_languages())
        if unknown:
            raise ValueError(f"languages: '{unknown[0]}' cannot be identified")


def identify(text: str) -> tuple[str, float]:
    """The language of a text among ``LANGUAGES``, and py3langid's confidence, 0 to 1.

    Examines up to 2,000 characters without code and addresses. A text without letters gives ("", 0.0).
    """
    sample = _sample(text)
    if not any(map(str.isalpha, sample)):
        return "", 0.0
    language, confidence = _identifier().classify(sample)
    language = _SPELT_AS.get(language, language)
    if language in ("ms", "id"):
        words = _WORD.findall(sample.lower())
        malay = sum(word in _typical_words("ms") for word in words)
        indonesian = sum(word in _typical_words("id") for word in words)
        if malay != indonesian:
            language = "ms" if malay > indonesian else "id"
    return language, float(confidence)


def _sample(text: str) -> str:
    third = SAMPLE // 3
    if len(text) > 4 * SAMPLE:  # parts long enough to leave text when code is removed
        middle = len(text) // 2
        parts = (text[: 2 * third], text[middle - third : middle + third], text[-2 * third :])
        return " ".join(_NOISE.sub(" ", part) for part in parts)[:SAMPLE] or text[:SAMPLE]
    return _NOISE.sub(" ", text)[:SAMPLE]


@cache
def _typical_words(language: str) -> frozenset[str]:
    """Words typical of Malay or of Indonesian and rare in the other, by frequency in half of a corpus."""
    path = Path(__file__).with_name(f"words.{language}.txt")
    return frozenset(path.read_text(encoding="utf-8").split())


@cache
def _identifier() -> Any:
    langid = need("py3langid.langid", "data", "language identification")
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    model.set_languages([name for name in (*sorted(LANGUAGES), *_SPELT_AS) if name in model.labels])
    return model


@cache
def known_languages() -> frozenset[str]:
    """All languages that can be identified."""
    langid = need("py3langid.langid", "data", "language identification")
    labels = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE).labels
    return frozenset(_SPELT_AS.get(name, name) for name in labels)
