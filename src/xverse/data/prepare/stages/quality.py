"""Quality filters: rules of Gopher, C4 and FineWeb, with thresholds by language.

Rae et al. 2021 (arXiv 2112.11446, table A1), Raffel et al. 2019 (1910.10683, section 2.2), Penedo et al. 2024
(2406.17557, section 3.6). Their thresholds are for English. Text without spaces between words (Chinese,
Japanese, Thai) is measured in characters, with a minimum share of its script; sentences end with 。！？, in
Thai with no mark.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

# The letters of languages without spaces between words.
_LETTERS = {
    "zh": "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff",
    "ja": "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff",
    "th": "\u0e00-\u0e7f",
    "lo": "\u0e80-\u0eff",
    "my": "\u1000-\u109f",
    "km": "\u1780-\u17ff",
}
_SCRIPTS = {language: re.compile(f"[{letters}]") for language, letters in _LETTERS.items()}
_COMMON = {
    "en": "the be to of and that have with is are was in",
    "de": "der die das und ist von zu den mit nicht ein sich",
    "fr": "le la les de des et un une est que dans pour",
    "es": "el la los de que y en un una es por con",
    "it": "il la di che e un una per non con del è",
    "pt": "o a os de que e do da em um para com",
    "nl": "de het een en van is dat in te niet op met",
    "ru": "и в не на что с он как это по из к",
}
_STOP = {language: frozenset(words.split()) for language, words in _COMMON.items()}
_END = tuple(".!?…。！？｡\"'”’»」』)）:;։؟۔।॥܀")
_BULLETS = ("-", "*", "•", "‣", "●", "–", "·", "・")
_BLOCKED = (
    "lorem ipsum",
    "enable javascript",
    "javascript is disabled",
    "请启用javascript",
    "您的浏览器不支持",
)


@dataclass
class Rules:
    """Thresholds of one language; None disables a rule.

    ``min_words`` and ``max_words`` count characters in scripts without spaces; the mean word length does not
    apply there. Shares are between 0 and 1.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word: float | None = 3.0
    max_mean_word: float | None = 10.0
    max_symbols: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_letter_words: float | None = 0.8
    min_stop_words: int | None = None
    min_script: float | None = None
    max_same_lines: float | None = 0.3
    max_same_line_characters: float | None = 0.2
    max_top_ngrams: float | None = 0.2
    max_repeated_ngrams: float | None = 0.15
    min_ended_lines: float | None = 0.12
    max_short_lines: float | None = None
    blocked_phrases: bool = True


_LONG_WORDS: dict[str, float | None] = {"max_mean_word": 14.0}
_BY_LANGUAGE: dict[str, dict[str, float | None]] = {
    "en": {"min_stop_words": 2},
    **{name: {"min_stop_words": 2} for name in ("fr", "es", "it", "pt", "nl", "ru")},
    "de": {"min_stop_words": 2, "max_mean_word": 12.0},
    **dict.fromkeys(("fi", "et", "hu", "tr", "kk", "lt", "lv"), _LONG_WORDS),
    "ta": {"max_mean_word": 16.0, "min_letter_words": 0.7},
    "hi": {"min_mean_word": 2.0},
    "mr": {"max_mean_word": 14.0},
    "vi": {"min_mean_word": 2.0},
    "ko": {"min_mean_word": 1.5},
    "he": {"min_mean_word": 2.5},
    "zh": {"min_words": 80, "max_words": 200_000, "min_script": 0.4},
    "ja": {"min_words": 100, "max_words": 200_000, "min_script": 0.4},
    "th": {"min_words": 150, "max_words": 400_000, "min_script": 0.4, "min_ended_lines": None},
    **{name: {"min_words": 150, "min_script": 0.4, "min_ended_lines": None} for name in ("lo", "my", "km")},
}


@dataclass
class QualityStage:
    """Thresholds that replace the built-in ones: ``all`` for every language, ``languages`` for one."""

    all: dict[str, float | None] = field(default_factory=dict)
    languages: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [rule.name for rule in fields(Rules)]
        for changes in (self.all, *self.languages.values()):
            unknown = next((name for name in changes if name not in known), None)
            if unknown is not None:
                raise ValueError(f"quality: unknown rule '{unknown}' (known: {', '.join(known)})")

    def rules(self, language: str) -> Rules:
        """The thresholds of a language."""
        return make_rules(language, {**self.all, **self.languages.get(language, {})})


def make_rules(language: str, changes: Mapping[str, float | None] | None = None) -> Rules:
    """The built-in thresholds of a language, with ``changes``."""
    values = {**_BY_LANGUAGE.get(language, {}), **(changes or {})}
    return replace(Rules(), **values)  # type: ignore[arg-type]


def quality(text: str, language: str, rules: Rules) -> str | None:
    """The name of the first rule that a text breaks, for which it is dropped; None if it breaks none."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return "min_words"
    script = _SCRIPTS.get(language)
    figures = (
        _of_words(text, language) if script is None else _of_script(text, script),
        _of_lines(text, lines, rules),
        _of_repetitions(text, lines, rules, script is not None),
    )
    return next((name for name, value in itertools.chain(*figures) if _breaks(name, value, rules)), None)


def _breaks(name: str, value: float, rules: Rules) -> bool:
    limit = getattr(rules, name)
    return limit is not None and (value < limit if name.startswith("min_") else value > limit)


Figures = Iterator[tuple[str, float]]  # of a text, by the name of the rule that bounds each


def _of_words(text: str, language: str) -> Figures:
    words = text.split()
    count = max(1, len(words))
    bare = [word for word in words if any(map(str.isalnum, word))]
    mean = sum(map(len, bare)) / max(1, len(bare))
    yield "min_words", len(words)
    yield "max_words", len(words)
    yield "min_mean_word", mean
    yield "max_mean_word", mean
    yield "max_symbols", (text.count("#") + text.count("...") + text.count("…")) / count
    yield "min_letter_words", sum(any(map(str.isalpha, word)) for word in words) / count
    if language in _STOP:
        yield "min_stop_words", len(_STOP[language].intersection(map(str.lower, words)))


def _of_script(text: str, script: re.Pattern[str]) -> Figures:
    written = len("".join(text.split()))
    yield "min_words", written
    yield "max_words", written
    yield "min_script", len(script.findall(text)) / written
    yield "max_symbols", (text.count("#") + text.count("…") / 2) / written


def _of_lines(text: str, lines: Sequence[str], rules: Rules) -> Figures:
    count = len(lines)
    yield "max_bullet_lines", sum(line.startswith(_BULLETS) for line in lines) / count
    yield "max_ellipsis_lines", sum(line.endswith(("...", "…")) for line in lines) / count
    yield "min_ended_lines", sum(line.endswith(_END) for line in lines) / count
    yield "max_short_lines", sum(len(line) <= 30 for line in lines) / count
    if rules.blocked_phrases and any(phrase in text[:20_000].lower() for phrase in _BLOCKED):
        yield "blocked_phrases", math.inf  # above any limit


def _of_repetitions(text: str, lines: Sequence[str], rules: Rules, unspaced: bool) -> Figures:
    seen = Counter(lines)
    yield "max_same_lines", 1 - len(seen) / len(lines)
    again = sum(len(line) * (count - 1) for line, count in seen.items())
    yield "max_same_line_characters", again / sum(map(len, lines))
    # N-grams of words, or of twice as many characters in scripts without spaces.
    words: Sequence[str] = "".join(text.split()) if unspaced else text.split()
    total = len(words) if unspaced else sum(map(len, words))
    short, long = (4, 20) if unspaced else (2, 10)
    if rules.max_top_ngrams is not None and len(words) >= short:
        grams = zip(*(words[i:] for i in range(short)), strict=False)
        gram, often = Counter(grams).most_common(1)[0]
        if often > 2:
            yield "max_top_ngrams", often * sum(map(len, gram)) / total
    if len(words) >= 2 * long:
        yield "max_repeated_ngrams", _repeated_share(words, long) / total


def _repeated_share(words: Sequence[str], n: int) -> int:
    """The number of characters in repeated n-grams, without overlaps."""
    seen: set[int] = set()
    repeated, position = 0, 0
    while position + n <= len(words):
        gram = hash(
            words[position : position + n]
            if isinstance(words, str)
            else tuple(words[position : position + n])
        )
        if gram in seen:
            repeated += sum(map(len, words[position : position + n]))
            position += n
        else:
            seen.add(gram)
            position += 1
    return repeated
