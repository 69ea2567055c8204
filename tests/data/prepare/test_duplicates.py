from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies.data import planted_copies, planted_questions, similarity
from xverse.data.benchmarks.questions import RawQuestion
from xverse.data.prepare.duplicates import EXACT, NEAR, choose_copies
from xverse.data.prepare.ngrams import hash_words, ngrams, split_words
from xverse.data.prepare.signatures import signature
from xverse.data.prepare.stages.decontaminate import DecontaminateStage, Index, make_index
from xverse.texts import read_jsonl

pytestmark = pytest.mark.slow


def test_words_are_characters_where_no_spaces_are() -> None:
    assert split_words("It's 3.14, OK? 中文abc字 ｗｉｄｅ") == [
        "it",
        "s",
        "3",
        "14",
        "ok",
        "中",
        "文",
        "abc",
        "字",
        "wide",
    ]
    assert split_words("हिन्दी में") == ["हिन्दी", "में"]
    assert split_words("ภาษา") == ["ภ", "า", "ษ", "า"]
    assert split_words("これは本") == ["こ", "れ", "は", "本"]


def test_an_ngram_is_its_words_and_their_order() -> None:
    one, two = hash_words("a b c d"), hash_words("b c d a")
    assert ngrams(one, 3)[1] == ngrams(two, 3)[0]
    assert ngrams(one, 3)[0] != ngrams(two, 3)[1]
    assert len(ngrams(one, 5)) == 0
    # Pinned: it decides which documents go, on every machine.
    assert int(hash_words("words")[0]) == 69340570595827017


def test_signatures_estimate_similarity() -> None:
    text = [f"w{i}" for i in range(400)]
    changed = [*text[:200], "other", *text[201:]]
    one, two = hash_words(" ".join(text)), hash_words(" ".join(changed))
    true = similarity(one, two)
    assert float(np.mean(signature(one) == signature(two))) == pytest.approx(true, abs=0.08)
    assert np.array_equal(signature(one), signature(hash_words(" ".join(text).upper() + "!")))
    assert signature(hash_words("")).min() == 2**32 - 1


def test_chains_of_copies_keep_their_first() -> None:
    exact = np.array([[3, 5]])
    near = np.array([[7, 8], [2, 3], [5, 7]])
    assert choose_copies(9, [(exact, near)]).tolist() == [0, 0, 0, NEAR, 0, EXACT, 0, NEAR, NEAR]
    nothing = np.empty((0, 2), np.int64)
    assert choose_copies(3, [(nothing, nothing)]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("language", ["en", "zh", "th"])
def test_planted_copies_are_found(test_data: Path, language: str) -> None:
    path = test_data / "corpus" / f"{language}.jsonl.gz"
    texts = (row["text"] for (_, row), _ in zip(read_jsonl(path), range(600), strict=False))
    found = planted_copies(texts, 150)
    assert found["recall"] >= 0.95
    assert found["precision"] >= 0.95


def q(id: str, text: str, options: tuple[str, ...] = (), passage: str = "") -> RawQuestion:
    return RawQuestion(id=id, where=id, text=text, options=options, passage=passage)


ITEMS = [
    (
        "mmlu",
        q("m/0", "Which enzyme unwinds the double helix of DNA during its replication in a living cell?"),
    ),
    ("mmlu", q("m/1", "Which of the following statements is true?", ("Cats bark", "Dogs purr", "Fish sing"))),
    (
        "mmlu",
        q("m/2", "Which of the following statements is true?", ("One is even", "Two is prime", "Ten is odd")),
    ),
    ("mmlu", q("m/3", "Pi is")),
    ("ceval", q("c/0", "下列关于法律推理的表述，能够成立的是____。", ("甲", "乙", "丙", "丁"))),
    ("agieval", q("a/0", "What does the author think?", (), " ".join(f"passage{i}" for i in range(40)))),
]


def test_questions_are_found_whole_or_by_half_of_their_ngrams(tmp_path: Path) -> None:
    made = make_index(ITEMS)
    made.save(tmp_path / "index.npz")
    index = Index.load(tmp_path / "index.npz")
    assert index.too_short == {"mmlu": ["m/3"]}

    def find(text: str) -> set[tuple[str, str]]:
        assert made.find(text) == index.find(text, hash_words(text))
        return index.find(text)

    before, after = "Some text before it. ", " And some text after it."
    assert find(before + ITEMS[0][1].text.upper() + after) == {("mmlu", "m/0")}
    assert find(before + "the double helix of DNA during its replication" + after) == set()
    assert find(before + "Which of the following statements is true? It depends." + after) == set()
    assert find(
        "Which of the following statements is true? A. One is even B. Two is prime C. Ten is odd"
    ) == {("mmlu", "m/2")}
    assert find("考试题：下列关于法律推理的表述，能够成立的是（　）。A甲") == {("ceval", "c/0")}
    assert find("下列关于法律推理的书很多，能够买到的是少数。") == set()
    assert find(" ".join(f"passage{i}" for i in range(25))) == set()
    assert find(" ".join(f"passage{i}" for i in range(30))) == {("agieval", "a/0")}
    assert find("") == set()


SHORT = [
    ("agieval", q("math/0", "Simplify $\\sqrt{720}$.")),
    ("agieval", q("math/1", "Compute $\\cos 36^\\circ.$")),
    ("agieval", q("math/2", "Solve it.")),
    ("ceval", q("art/0", "____是喜剧角色。", ("丑", "生", "杂", "净"))),
    ("ceval", q("teacher/0", "1，1，2，6，24，____。", ("48", "96", "120", "144"))),
    ("mmlu", q("m/0", "This is", ("a", "b"))),
    ("mmlu", q("m/1", "This is", ("c", "d"))),
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A text.\nsimplify $\\sqrt{720}$\nIts end.", "math/0"),
        ("Q: Simplify $\\sqrt{720}$. A: It is.", "math/0"),
        ("3. Simplify √720, or \\sqrt{720}.", None),
        ("One may simplify \\sqrt{720} by hand.", None),
        ("First. Compute $\\cos 36^\\circ.$ Then more.", "math/1"),
        ("Solve it.", None),
        ("一、____是喜剧角色。\nA. 丑\nB. 生\nC. 杂\nD. 净", "art/0"),
        ("问题：是喜剧角色。", "art/0"),
        ("他在戏里演的是喜剧角色。", None),
        ("有一道题：\n1，1，2，6，24，____。\nA. 48", "teacher/0"),
        ("row 7: 1 1 2 6 24 120 720", None),
        ("This is a b", "m/0"),
        ("This is a b c", None),
        ("This is", None),
    ],
)
def test_short_questions_are_found_as_whole_lines_or_sentences(text: str, found: str | None) -> None:
    index = make_index(SHORT)
    assert index.too_short == {"agieval": ["math/2"]}
    assert {item for _, item in index.find(text)} == ({found} if found else set())


def test_every_short_question_of_the_benchmarks_is_found(test_data: Path) -> None:
    items = list(DecontaminateStage(test_data / "eval", ["agieval", "ceval"]).questions())
    index = make_index(items)
    assert index.too_short == {}
    short = {index.texts[i] for i in index.lines}
    assert len(short) == 70  # 46 of them are rows of numbers
    for name, item in items:
        if (name, item.id) in short:
            options = "\n".join(
                f"{letter}. {text}" for letter, text in zip("ABCD", item.options, strict=False)
            )
            for planted in (
                f"Before.\n{item.text}\n{options}\nAfter.",
                f"Before. Question: {item.text}\n{options}\nAnswer:",
            ):
                assert (name, item.id) in index.find(planted)


def test_every_planted_question_of_the_benchmarks_is_found(test_data: Path) -> None:
    path = test_data / "corpus" / "en.jsonl.gz"
    texts = (row["text"] for (_, row), _ in zip(read_jsonl(path), range(900), strict=False))
    benchmarks = ["ceval", "gaokao-english", "gsm8k"]  # xverse bench data has all of them
    found = planted_questions(test_data / "eval", texts, benchmarks, most=100)
    for name, row in found["benchmarks"].items():
        assert row["planted"] == row["found"], name
    assert found["too_short"] == {}
    assert found["texts_without"]["something_found"] <= 0.01 * found["texts_without"]["looked_at"]
