"""What the generators of dialogues share: choices split between training and exam, and the refusal list."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
HELD = 5  # one phrasing, and one filler, of so many is kept for the exam
PEOPLE = {
    "zh": ["小明", "小红", "小刚", "小丽", "小华", "小军", "小芳", "小强", "小美", "小东", "小云", "小林"],
    "en": ["Tom", "Anna", "Ben", "Mia", "Jack", "Lucy", "Sam", "Emma", "Leo", "Nina", "Max", "Ella"],
}


@dataclass(frozen=True)
class Dialogue:
    """``turns``: the user's and the assistant's in turn. ``check``: how the last reply is scored, with the
    keys that ``xverse.eval.replies`` documents."""

    turns: tuple[str, ...]
    check: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> list[str]:
        return list(self.turns[::2])

    def messages(self) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {
            "messages": [
                {"role": roles[number % 2], "content": text} for number, text in enumerate(self.turns)
            ]
        }


class Writer:
    """Random choices for one side of the split: ``held`` is the exam, otherwise training."""

    def __init__(self, random: Random, held: bool) -> None:
        self.random = random
        self.held = held

    def one(self, options: Sequence[T]) -> T:
        """Any of the options; both sides share them."""
        return options[self.random.randrange(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        return self.random.sample(list(options), count)

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def ask(self, phrasings: Sequence[str], **values: Any) -> str:
        """One of this side's phrasings, filled in."""
        return self.one(split(phrasings, self.held)).format(**values)

    def say(self, phrasings: Sequence[str], **values: Any) -> str:
        """One of the phrasings of a reply, filled in; both sides share them."""
        return self.one(phrasings).format(**values)

    def filler(self, draw: Callable[[], T]) -> T:
        """What ``draw`` returns, drawn again until it belongs to this side."""
        for _ in range(1000):
            value = draw()
            if is_held(value) == self.held:
                return value
        raise AssertionError(f"no filler for the {'exam' if self.held else 'training'}")


Generator = Callable[[Writer, str], Dialogue]


@dataclass(frozen=True)
class Skill:
    """``kinds``: generators with their shares; ``more``: the same in languages besides zh and en."""

    name: str
    kinds: Sequence[tuple[float, Generator]]
    more: Sequence[tuple[float, Generator, Sequence[str]]] = ()

    def write(self, random: Random, language: str, held: bool = False) -> Dialogue:
        kinds = [(share, make) for share, make in self.kinds] if language in PEOPLE else []
        kinds += [(share, make) for share, make, languages in self.more if language in languages]
        (make,) = random.choices([make for _, make in kinds], [share for share, _ in kinds])
        return make(Writer(random, held), language)


def chat(language: str, longer: int) -> dict[str, Any]:
    """The rules of a reply that is free: it is in the language, neither refuses nor introduces itself."""
    return {"longer": longer, "language": language, "refuses": False, "none": ["XVERSE"]}


def number_of(value: Any) -> int:
    """A number that depends on the value only, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:6], "big")


def is_held(value: Any) -> bool:
    """Whether a filler belongs to the exam."""
    return number_of(value) % HELD == 0


def split(options: Sequence[T], held: bool) -> Sequence[T]:
    """The options of one side: a fifth, at least one, is held; a single option belongs to both."""
    return _sides(tuple(options))[0 if held else 1]


@functools.cache
def _sides(options: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if len(options) == 1:
        return options, options
    ordered = sorted(options, key=number_of)
    count = max(1, len(ordered) // HELD)
    return tuple(ordered[:count]), tuple(ordered[count:])


def normal(text: str) -> str:
    """A text without case, blanks and punctuation, to compare questions."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(letter for letter in text if letter.isalnum() or letter in "+-*/<>=")


def refused(root: Path = ROOT) -> set[str]:
    """The normal forms of all questions that training must not contain: the everyday questions, the source's
    conversations and harmful requests, and the acceptance list of the embedded model."""
    texts = [row["question"] for row in read(root / "recipes" / "skills" / "questions.jsonl")]
    for row in read(root / "src" / "xverse" / "eval" / "skills.jsonl"):
        # Short turns such as "你是谁" are asked everywhere; of a longer conversation the first turn is refused.
        texts += row["turns"] if row.get("skill") == "多语言能力" else row["turns"][:1]
    prompts = json.loads((root / "tests" / "nano" / "prompts.json").read_text(encoding="utf-8"))
    texts += [
        text for group in ("general", "identity") for texts in prompts[group].values() for text in texts
    ]
    texts += [text for turns in prompts["conversations"].values() for text in turns]
    return {normal(text) for text in texts}


def read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


POLITE = {  # before or after a question of any kind
    "zh": ["{q} 谢谢", "你好，{q}", "想问一下，{q}", "问你个问题：{q}", "{q}谢谢！", "帮我看一下：{q}", "嗨，{q}", "我有个问题。{q}"],
    "en": ["{q} Thanks!", "Hi, {q}", "Hello! {q}", "I have a question. {q}", "Can you help me? {q}", "Hey, {q}",
           "I'd like to know: {q}", "One thing: {q}", "{q} Thank you."],
}  # fmt: skip


def surface(random: Random, text: str, language: str) -> str:
    """A question as people type it: now and then without its mark or its capital, or with words around it."""
    if "\n" in text or len(text) > 80:
        return text
    if language in POLITE and len(text) > 4 and random.random() < 0.12:
        return random.choice(POLITE[language]).format(q=text)
    if random.random() < 0.25:
        text = re.sub(r"\s?[?？.。!！]$", "", text)
    if language != "zh" and random.random() < 0.2 and not text.startswith("I "):
        text = text[:1].lower() + text[1:]
    return text
