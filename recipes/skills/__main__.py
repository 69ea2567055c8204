"""Write training dialogues, or the exam of ``xverse eval --tasks skills``.

python -m recipes.skills --out runs/skills/skills.jsonl [--dialogues N] [--seed N] [--joined SHARE]
python -m recipes.skills --out runs/skills/instructions.jsonl --dialogues 0 --beside FILE_OR_FOLDER …
python -m recipes.skills --exam src/xverse/eval/exam.jsonl

``--beside`` copies dialogues of other files, without those that ask a question of the exam or of
questions.jsonl.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from recipes.skills import (
    arithmetic,
    code,
    everyday,
    followup,
    knowledge,
    languages,
    reasoning,
    roleplay,
    safety,
    understanding,
    writing,
)
from recipes.skills.common import Dialogue, Skill, normal, refused, surface
from xverse.cli import Parser, guarded
from xverse.values import whole

SKILLS = {
    skill.name: skill
    for skill in (
        roleplay.SKILL, knowledge.SKILL, writing.SKILL, code.SKILL, arithmetic.SKILL, reasoning.SKILL,
        understanding.SKILL, languages.SKILL, safety.SKILL, followup.SKILL,
    )
}  # fmt: skip
# Shares of the dialogues. A program is three times as long as a sum, so it gets fewer.
SHARES = {
    "roleplay": 4, "knowledge": 26, "writing": 8, "code": 5, "arithmetic": 28, "reasoning": 22, "understanding": 11,
    "languages": 34, "safety": 16, "followup": 7, "everyday": 5,
}  # fmt: skip
LANGUAGES = {"zh": 44, "en": 44, "ru": 2.4, "fr": 2.4, "ja": 2.4, "de": 2.4, "es": 2.4}
JOINED_CHARACTERS = 600  # of a conversation, a third for Chinese and Japanese: 99 % fit 256 tokens
EXAM_ITEMS = 40  # of each skill, in Chinese and in English
EXAM_SEED = 1


def dialogues(count: int, seed: int) -> Iterator[tuple[str, str, Dialogue]]:
    """``count`` different dialogues for training: (skill, language, dialogue)."""
    random = Random(seed)
    kinds = SKILLS | {"everyday": everyday.SKILL}
    forbidden = refused()
    asked = _examined()
    seen: set[tuple[str, ...]] = set()
    plan = [
        (skill, language, share * part / sum(SHARES.values()))
        for skill, share in SHARES.items()
        for language, part in _languages(kinds[skill]).items()
    ]
    for name, language, share in plan:
        wanted = round(count * share)
        for _ in range(wanted * 4):  # a small kind may have fewer different dialogues
            if not wanted:
                break
            made = kinds[name].write(random, language)
            turns = tuple(
                surface(random, text, language) if place % 2 == 0 else text
                for place, text in enumerate(made.turns)
            )
            plain = made.turns[::2]  # without the words that may be around a question
            if turns in seen or _key(plain) in asked or any(normal(text) in forbidden for text in plain):
                continue
            seen.add(turns)
            wanted -= 1
            yield name, language, Dialogue(turns, made.check)


def beside(path: Path) -> Iterator[Dialogue]:
    """The dialogues of a file or folder that ask none of the questions kept for measurements."""
    from xverse.data.dialogues.formats import Skip, to_dialogue
    from xverse.finetune.settings import DatasetUse
    from xverse.finetune.sources import find_sources, read_file, source_files

    forbidden = refused()
    asked = _examined()
    for source in find_sources([DatasetUse(name=str(path))], Path()):
        for file in source_files(source):
            for item, info in read_file(file, "sft", Counter()):
                try:
                    messages = to_dialogue(item, info)
                except Skip:
                    continue
                roles = [message["role"] for message in messages]
                if roles != ["user", "assistant"] * (len(roles) // 2):
                    continue
                turns = tuple(message["content"] for message in messages)
                if _key(turns[::2]) not in asked and not any(
                    normal(text) in forbidden for text in turns[::2]
                ):
                    yield Dialogue(turns)


def _key(asked: Sequence[str]) -> str:
    return normal("\n".join(asked))


def _languages(skill: Skill) -> dict[str, float]:
    """The languages of a skill with their shares, which sum to 1."""
    own = {"zh", "en"} | {language for _, _, languages in skill.more for language in languages}
    shares = {language: share for language, share in LANGUAGES.items() if language in own}
    return {language: share / sum(shares.values()) for language, share in shares.items()}


@functools.cache
def _examined() -> frozenset[str]:
    return frozenset(_key(item["turns"]) for item in exam())


def exam(count: int = EXAM_ITEMS) -> list[dict[str, Any]]:
    """The exam: ``count`` different items of each skill and language, from held-out fillers and phrasings."""
    items = []
    forbidden = refused()
    for name, skill in SKILLS.items():
        for language in ("zh", "en"):
            random = Random(f"{EXAM_SEED} {name} {language}")
            seen: set[str] = set()
            for _ in range(count * 50):
                made = skill.write(random, language, held=True)
                key = _key(made.asked)
                if key in seen or any(normal(text) in forbidden for text in made.asked):
                    continue
                seen.add(key)
                items.append(
                    {"skill": name, "language": language, "turns": made.asked, "check": dict(made.check)}
                )
                if len(seen) == count:
                    break
            assert len(seen) == count, f"{name}, {language}: only {len(seen)} items"
    return items


def joined(made: list[Dialogue], share: float, seed: int) -> Iterator[Dialogue]:
    """The dialogues, of which a share is followed by one to three others of the same script, so that a model
    answers the last question and not the one before it. All are used once; the order is drawn by ``seed``."""
    if not share:
        yield from made
        return
    random = Random(seed)
    scripts: dict[bool, list[Dialogue]] = {True: [], False: []}
    for one in random.sample(made, len(made)):
        scripts[any(character >= "\u2e80" for character in one.turns[0])].append(one)
    for wide, waiting in scripts.items():
        while waiting:
            turns = waiting.pop().turns
            for _ in range(random.randint(1, 3) if random.random() < share else 0):
                longest = JOINED_CHARACTERS // (3 if wide else 1)
                if waiting and sum(map(len, (*turns, *waiting[-1].turns))) <= longest:
                    turns += waiting.pop().turns
            yield Dialogue(turns)


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("skills", lambda: _write(arguments))


def _write(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m recipes.skills", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write training dialogues")
    parser.add_argument(
        "--dialogues", type=whole(), default=40_000, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole(), default=0, help="of the training dialogues (default: %(default)s)"
    )
    parser.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="dialogues to copy, without the exam's",
    )
    parser.add_argument(
        "--joined",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the dialogues are followed by others in the same conversation (default: %(default)s)",
    )
    parser.add_argument("--exam", type=Path, metavar="FILE", help="write the exam")
    args = parser.parse_args(arguments)
    if args.out is None and args.exam is None:
        parser.error("nothing to write; give --out, --exam or both")
    if args.beside and args.out is None:
        parser.error("--beside needs --out")
    if not 0 <= args.joined <= 1:
        parser.error("--joined must be from 0 to 1")

    from xverse.files import atomic_file

    made = [] if args.out is None else list(dialogues(args.dialogues, args.seed))
    made += [(path.name, "", dialogue) for path in args.beside for dialogue in beside(path)]
    if args.exam is not None:
        with atomic_file(args.exam) as temporary:
            temporary.write_text("".join(_line(item) for item in exam()), encoding="utf-8")
    if args.out is not None:
        with atomic_file(args.out) as temporary:
            lines = joined([one for _, _, one in made], args.joined, args.seed)
            temporary.write_text("".join(_line(one.messages()) for one in lines), encoding="utf-8")
        counts = Counter(name for name, _, _ in made)
        print(f"{len(made)} dialogues: {', '.join(f'{name} {number}' for name, number in counts.items())}")
    return 0


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


if __name__ == "__main__":
    sys.exit(main())
