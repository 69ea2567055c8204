"""Language identification: py3langid (its model is inside the package), restricted to a recipe's languages.

It was chosen over lingua and fastText's lid.176 by accuracy and speed on this project's 41 languages
(benchmarks/data.md). Malay and Indonesian it confuses; words that only one of them uses decide there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from xverse.config import need

_NAMES = (
    "ar bg ca cs da de el en es et fa fi fr he hi hu id it ja kk ko lt lv mr ms nl no pl pt ro ru sk sl "
    "sr sv ta th tr uk vi zh"
)
LANGUAGES = tuple(_NAMES.split())
SAMPLE = 2_000  # characters that are looked at: of the beginning, the middle and the end
_SPELT_AS = {"nb": "no", "nn": "no"}
# Code, addresses and markup, which are English in every language.
_NOISE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+|\]\([^)\n]*\)|<[^>\n]{1,200}>|[\w./\\-]+\.[a-z]{2,5}\b",
    re.S,
)
_WORD = re.compile(r"[a-z]{3,}")


@dataclass
class LanguageStage:
    """``languages``: those that are kept. A document of another one is dropped, as is one of which the
    language is less sure than ``min_confidence``, or is not the one that the document says (``mismatch``:
    drop or relabel).
    """

    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))
    min_confidence: float = 0.5
    mismatch: Literal["drop", "relabel"] = "drop"

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence {self.min_confidence} is not between 0 and 1")
        unknown = sorted(set(self.languages) - known_languages())
        if unknown:
            raise ValueError(f"languages: '{unknown[0]}' is none that can be identified")


def identify(text: str, languages: Sequence[str] = LANGUAGES) -> tuple[str, float]:
    """The language of a text among ``languages`` and how sure that is, 0 to 1 (py3langid's own figure).

    Up to 2,000 characters are looked at, code and addresses left out. A text without a letter is ("", 0.0).
    """
    sample = _sample(text)
    if not any(map(str.isalpha, sample)):
        return "", 0.0
    language, confidence = _identifier(tuple(sorted(languages))).classify(sample)
    language = _SPELT_AS.get(language, language)
    if language in ("ms", "id") and "ms" in languages and "id" in languages:
        words = _WORD.findall(sample.lower())
        malay = sum(word in _usual("ms") for word in words)
        indonesian = sum(word in _usual("id") for word in words)
        if malay != indonesian:
            language = "ms" if malay > indonesian else "id"
    return language, float(confidence)


def _sample(text: str) -> str:
    third = SAMPLE // 3
    if len(text) > 4 * SAMPLE:  # parts long enough that code cut out of them leaves something
        middle = len(text) // 2
        parts = (text[: 2 * third], text[middle - third : middle + third], text[-2 * third :])
        return " ".join(_NOISE.sub(" ", part) for part in parts)[:SAMPLE] or text[:SAMPLE]
    return _NOISE.sub(" ", text)[:SAMPLE]


@lru_cache(maxsize=2)
def _usual(language: str) -> frozenset[str]:
    """Words that are usual in one of Malay and Indonesian and rare in the other: chosen by their frequencies
    in half of the documents of this project's corpus."""
    path = Path(__file__).with_name(f"words.{language}.txt")
    return frozenset(path.read_text(encoding="utf-8").split())


@lru_cache(maxsize=4)
def _identifier(languages: tuple[str, ...]) -> Any:
    langid = need("py3langid.langid", "data", "language identification")
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    written = [name for name, ours in _SPELT_AS.items() if ours in languages and name in model.labels]
    model.set_languages([name for name in languages if name in model.labels] + written)
    return model


@lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """Every language that can be identified."""
    langid = need("py3langid.langid", "data", "language identification")
    labels = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE).labels
    return frozenset(_SPELT_AS.get(name, name) for name in labels)
