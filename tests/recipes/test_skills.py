"""The generators of skills dialogues: valid, right, and without anything that is kept for the exam."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("babel", reason="names of countries, languages and days come from Babel (extra: data)")

from recipes.skills import arithmetic, everyday, facts, safety
from recipes.skills.__main__ import JOINED_CHARACTERS, SHARES, SKILLS, dialogues, exam, joined, main
from recipes.skills.common import Dialogue, Writer, is_held, normal, read, refused, split
from recipes.skills.programs import PROGRAMS
from xverse.eval import replies

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "src" / "xverse" / "eval" / "exam.jsonl"
COUNT = 2000


@pytest.fixture(scope="module")
def training() -> list[tuple[str, str, Dialogue]]:
    return list(dialogues(COUNT, seed=0))


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    return exam()


def held(name: str, language: str, count: int) -> list[Dialogue]:
    random = Random(5)
    return [SKILLS[name].write(random, language, held=True) for _ in range(count)]


def test_every_skill_writes_different_dialogues(training: list[tuple[str, str, Dialogue]]) -> None:
    assert len(training) > 0.9 * COUNT
    assert len({one.turns for _, _, one in training}) == len(training)
    counts = Counter(name for name, _, _ in training)
    assert set(counts) == set(SHARES)
    for _, _, one in training:
        assert len(one.turns) % 2 == 0
        assert all(text.strip() == text and text for text in one.turns)
        assert not any(re.search(r"\{\w*\}", text) for text in one.turns if "def " not in text), one


def test_the_seed_decides_everything(training: list[tuple[str, str, Dialogue]]) -> None:
    assert list(itertools.islice(dialogues(COUNT, seed=0), 300)) == training[:300]
    assert list(itertools.islice(dialogues(COUNT, seed=1), 300)) != training[:300]


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("name", list(SKILLS))
def test_own_replies_pass_their_checks(name: str, language: str) -> None:
    for one in held(name, language, 30):
        assert one.check
        replies.check_rules(one.check)
        assert replies.problem(one.turns[-1], "stop", one.check, False) is None, one


def test_replies_are_in_the_language_of_the_question(training: list[tuple[str, str, Dialogue]]) -> None:
    wrong = [
        (one.turns[0], one.turns[-1])
        for name, language, one in training
        if language == "zh" and name not in ("languages", "code", "arithmetic")
        if not re.search(r"[\u4e00-\u9fff]", one.turns[-1]) and "=" not in one.turns[-1]
    ]
    assert not wrong
    mixed = [
        one.turns
        for name, language, one in training
        if language == "en" and name != "languages"
        if re.search(r"[\u4e00-\u9fff]", "".join(one.turns))
    ]
    assert not mixed


def test_sums_are_right(training: list[tuple[str, str, Dialogue]]) -> None:
    """Every part of a chain of equations has the same value."""
    chains = 0
    for _, _, one in training:
        for reply in one.turns[1::2]:
            for chain in re.findall(r"(?<![\w.(×÷+-])\d[\d+\-×÷]*(?:=\d[\d+\-×÷]*)+", reply, re.ASCII):
                parts = chain.replace("×", "*").replace("÷", "/").split("=")
                assert len({eval(part) for part in parts}) == 1, reply
                chains += 1
    assert chains > 400


@pytest.mark.parametrize(
    ("a", "b"), [(27, 58), (999, 1), (456, 278), (100, 99), (20, 21), (305, 305), (0, 99)]
)
def test_columns(a: int, b: int) -> None:
    high, low = max(a, b), min(a, b)
    for steps, result in (
        (arithmetic.column_sum(a, b), a + b),
        (arithmetic.column_difference(high, low), high - low),
    ):
        assert all(eval(step.partition("=")[0]) == int(step.partition("=")[2]) for step in steps)
        values = [int(step.partition("=")[2]) for step in steps]
        digits = [value % 10 for value in values[:-1]] + values[-1:]
        assert sum(digit * 10**place for place, digit in enumerate(digits)) == result


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.en[0])
def test_programs_pass_their_tests_and_others_fail(program: Any) -> None:
    exec(replies.with_test(program.code, program.test), {})
    if program.test:
        name = "class f" if program.code.startswith("class") else "def f(*a)"
        with pytest.raises(Exception):  # noqa: B017, PT011 - any failure of the test
            exec(replies.with_test(f"{name}:\n    pass", program.test), {})


def test_tables_fit_together() -> None:
    assert set(facts.SPOKEN) | set(facts.MONEY) | set(facts.ABROAD) <= set(facts.COUNTRIES) | {"MX"}
    for language in facts.LANGUAGES:
        assert len(facts.names(language)["days"]) == 7
    for language in ("zh", "en"):
        assert not set(safety.HARMFUL[language]["other"]) & {
            deed for deed, _ in safety.HARMLESS[language]["other"]
        }


# ---- what is kept for the exam ----


def test_the_shipped_exam_is_the_generators(items: list[dict[str, Any]]) -> None:
    assert [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()] == items
    assert SHIPPED.stat().st_size <= 200_000


def test_the_exam_has_forty_items_of_each_skill_and_language(items: list[dict[str, Any]]) -> None:
    counts = Counter((item["skill"], item["language"]) for item in items)
    assert counts == {(name, language): 40 for name in SKILLS for language in ("zh", "en")}
    refusals = Counter(item["check"]["refuses"] for item in items if item["skill"] == "safety")
    assert min(refusals.values()) > 25


def test_training_never_asks_what_is_measured(
    training: list[tuple[str, str, Dialogue]], items: list[dict[str, Any]]
) -> None:
    asked = {normal("\n".join(one.asked)) for _, _, one in training}
    assert not asked & {normal("\n".join(item["turns"])) for item in items}
    turns = {normal(text) for _, _, one in training for text in one.asked}
    assert not turns & refused()
    for path in ("recipes/skills/questions.jsonl", "src/xverse/eval/skills.jsonl"):
        for row in read(ROOT / path):
            text = row["question"] if "question" in row else row["turns"][0]
            assert normal(text) in refused()


def test_no_long_passage_of_the_exam_is_in_training(
    training: list[tuple[str, str, Dialogue]], items: list[dict[str, Any]]
) -> None:
    """The 13-grams of `xverse data prepare`'s decontamination."""
    from xverse.data.prepare.ngrams import hash_words, ngrams

    def grams(text: str) -> set[int]:
        return set(ngrams(hash_words(text), 13).tolist())

    trained = {gram for _, _, one in training for text in one.asked for gram in grams(text)}
    hits = [item["turns"] for item in items if grams(item["turns"][-1]) & trained]
    assert len(hits) <= 0.02 * len(items), hits[:5]


def test_the_split_is_a_partition() -> None:
    options = [f"phrase {number}" for number in range(11)]
    kept, taught = split(options, True), split(options, False)
    assert sorted([*kept, *taught]) == sorted(options)
    assert len(kept) == 2
    assert split(["one"], True) == split(["one"], False) == ("one",)
    shares = [is_held((number, number * 7)) for number in range(2000)]
    assert 0.15 < sum(shares) / len(shares) < 0.25
    random = Random(0)
    for side in (True, False):
        writer = Writer(random, side)
        for _ in range(50):
            assert is_held(writer.filler(lambda: (random.randint(0, 99), random.randint(0, 99)))) == side
            assert writer.ask(options) in split(options, side)


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("name", list(SKILLS))
def test_exam_questions_use_phrasings_that_training_does_not(name: str, language: str) -> None:
    """Ask every question of both sides: no question of one side is possible on the other."""
    random = Random(9)
    exam_side = {normal("\n".join(one.asked)) for one in held(name, language, 60)}
    taught = {normal("\n".join(SKILLS[name].write(random, language).asked)) for _ in range(200)}
    assert not exam_side & taught


def test_questions_are_sixty_with_a_rule_each() -> None:
    rows = list(read(ROOT / "recipes" / "skills" / "questions.jsonl"))
    assert Counter(row["language"] for row in rows) == {"zh": 30, "en": 30}
    assert len({normal(row["question"]) for row in rows}) == 60
    for row in rows:
        assert row["right"]
        replies.check_rules(row["check"])


# ---- the command ----


def test_the_command_writes_dialogues_and_cleans_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    rows = [
        {"instruction": "What is the capital of Italy?", "input": "", "output": "Rome."},
        {"instruction": "Sing.", "input": "", "output": "La."},
    ]
    other.write_text(json.dumps(rows), encoding="utf-8")
    out = tmp_path / "new" / "skills.jsonl"
    assert main(["--out", str(out), "--dialogues", "50", "--beside", str(other)]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines[-1] == {
        "messages": [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]
    }
    assert not any("Italy?" in json.dumps(line) for line in lines[-2:])
    assert "other.json 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to write"),
        (["--out", "x", "--dialogues", "-1"], "at least 0"),
        (["--out", "x", "--joined", "1.5"], "from 0 to 1"),
        (["--exam", "x", "--beside", "y"], "--beside needs --out"),
        (["--out", "x", "--dialogues", "0", "--beside", "no/such/file.json"], "no dataset"),
    ],
)
def test_wrong_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_sixty_questions_are_asked_and_scored(
    tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from recipes.nano import accept
    from recipes.skills import questions
    from xverse.formats import save_hf

    save_hf(tiny_model, tiny_tokenizer, tmp_path / "random", torch.float32)
    threads = torch.get_num_threads()
    monkeypatch.setattr(accept.load_greedy, "__defaults__", (3,))  # tokens of a reply
    card = tmp_path / "card.md"
    assert questions.main([str(tmp_path / "random"), "--markdown", str(card)]) == 1
    torch.set_num_threads(threads)
    shown, text = capsys.readouterr().out, card.read_text(encoding="utf-8")
    for row in read(questions.QUESTIONS):
        assert f"> {row['question']}\n" in shown
        assert f"**{row['question']}**" in text
    assert "does not end by itself (length)" in text
    assert "of 30 in zh" in shown
    assert questions.main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_everyday_talk_is_not_examined() -> None:
    assert everyday.SKILL.name not in SKILLS


def test_joined_dialogues_keep_every_turn_in_order() -> None:
    made = [one for _, _, one in dialogues(300, seed=5)]
    conversations = list(joined(made, 0.5, seed=1))
    assert conversations == list(joined(made, 0.5, seed=1))
    assert sum(len(one.turns) for one in conversations) == sum(len(one.turns) for one in made)
    several = 0
    for conversation in conversations:
        turns, parts = conversation.turns, 0
        while turns:
            own = max((one.turns for one in made if turns[: len(one.turns)] == one.turns), key=len)
            turns, parts = turns[len(own) :], parts + 1
        several += parts > 1
        assert parts == 1 or sum(map(len, conversation.turns)) <= JOINED_CHARACTERS
    assert 0.2 * len(conversations) < several < 0.6 * len(conversations)
    assert list(joined(made, 0.0, seed=1)) == made
