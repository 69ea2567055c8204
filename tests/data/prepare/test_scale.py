"""Many files, many documents, large documents: work and memory follow the bytes; results do not change."""

from __future__ import annotations

import json
import random
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scale import ALL
from tests.shards import write_shard
from xverse.config import UserError, build
from xverse.data import shards
from xverse.data.prepare import duplicates, join, keys, plan
from xverse.data.prepare.catalogue import FILES, MOST, divide
from xverse.data.prepare.clean import read_cleaned
from xverse.data.prepare.duplicates import EXACT, NEAR, choose_copies, exact_pairs, jobs, near_pairs
from xverse.data.prepare.executor import ExecutorConfig, run_phases
from xverse.data.prepare.keys import KEY, Keys, KeyWriter
from xverse.data.prepare.pipeline import PrepareRecipe, claim, phases, prepare
from xverse.data.prepare.plan import Gathered, MakePlan, SplitPlan
from xverse.data.prepare.sample import cut, piece_bytes
from xverse.data.shards import Shard
from xverse.tokenizer import Tokenizer


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(out: Path, tokenizer: Path | None, **given: Any) -> Any:
    executor = {"workers": 1, **given.pop("executor", {})}
    values = {"out": str(out), "tokenizer": str(tokenizer) if tokenizer else None, **given}
    return prepare(build(PrepareRecipe, {**values, "executor": executor}, "recipe"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    tiny_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(5)
    made = [" ".join(f"w{rng.randrange(300)}" for _ in range(rng.randrange(8, 40))) for _ in range(400)]
    return made + made[:40] + [f"{text} more" for text in made[40:60]]


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_files_than_descriptors(
    tmp_path: Path, tokenizer: Path, texts: list[str], few_descriptors: None
) -> None:
    """A file for each document gives the same shards as one file with all of them."""
    (tmp_path / "many").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "many" / f"{number:04d}.txt").write_text(text)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "one.jsonl").write_text(rows)
    options = {"valid_share": 0.1, "stages": {"near_duplicates": {}}}
    for name, path in (("many", "many"), ("one", "one.jsonl")):
        report = run(
            tmp_path / name / "out",
            tokenizer,
            inputs=[{"path": str(tmp_path / path), "lang": "en"}],
            **options,
        )
        assert report.duplicates == 40
    many, one = tree(tmp_path / "many" / "out"), tree(tmp_path / "one" / "out")
    for name in (
        "train/en/tokens.bin",
        "train/en/offsets.bin",
        "valid/en/tokens.bin",
        "valid/en/offsets.bin",
    ):
        assert many[name] == one[name]


def test_groups_follow_the_bytes() -> None:
    assert divide([], None) == []
    assert divide([10] * 3_000, None) == [0]
    assert len(divide([0] * 100_000, None)) == -(-100_000 // FILES)
    assert divide([MOST * 10, 1, 1, MOST * 10, 1], None) == [0, 1, 3, 4]
    groups = divide([1 << 20] * 10_000, None)  # 10 GB
    assert 150 <= len(groups) <= 300
    assert divide([1] * 7, 3) == sorted(set(divide([1] * 7, 3)))
    assert len(divide([1] * 7, 3)) >= 3
    assert len(divide([1, 1], 1_000)) == 2


def test_results_do_not_depend_on_groups_tasks_slices_and_blocks(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        rows = [{"text": text, "lang": "en" if len(text) % 2 else "de"} for text in texts[number::12]]
        lines = [json.dumps(row) for row in rows]
        lines.insert(number, "{")
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    given: dict[str, Any] = {"inputs": [{"path": str(folder)}], "stages": {"near_duplicates": {}}}
    given |= {"valid_share": 0.1, "valid_bytes": 2_000}
    run(tmp_path / "a", tokenizer, **given)
    run(tmp_path / "b", tokenizer, **given, executor={"tasks": 5})
    monkeypatch.setattr(keys, "BLOCK", 7)
    monkeypatch.setattr(duplicates, "PART", 60)
    monkeypatch.setattr(duplicates, "COMPARED", 3)
    monkeypatch.setattr(duplicates, "CHUNK", 11)
    monkeypatch.setattr(plan, "CHUNK", 11)
    monkeypatch.setattr(join, "SLICE", 700)
    monkeypatch.setattr(join, "COPIED", 100)
    run(tmp_path / "c", tokenizer, **given, executor={"tasks": 1_000})
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


def test_another_division_into_tasks_goes_on(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    path = tmp_path / "en.jsonl"
    path.write_text("".join(json.dumps({"text": text, "lang": "en"}) + "\n" for text in texts))
    (tmp_path / "fr.jsonl").write_text('{"text": "un", "lang": "fr"}\n')
    given: dict[str, Any] = {"inputs": [{"path": str(tmp_path / "*.jsonl")}]}
    run(tmp_path / "a", tokenizer, **given)
    values = {"out": str(tmp_path / "b"), "tokenizer": str(tokenizer), **given}
    recipe = build(PrepareRecipe, values, "recipe")
    recipe.executor = ExecutorConfig(workers=1, tasks=2)
    units = recipe.units()
    steps = phases(recipe, units, claim(recipe, units))
    run_phases(steps[:3], recipe.executor, recipe.out / "work" / "logs")
    run(tmp_path / "b", tokenizer, **given, executor={"tasks": 1})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def write_keys(folder: Path, groups: int, documents: int, rng: np.random.Generator, share: float) -> Keys:
    """Generated keys, a share of them of copies, as ``KeyWriter`` writes them."""
    hashes = rng.integers(0, 2**64, groups * documents, np.uint64)
    copies = rng.choice(len(hashes), int(share * len(hashes)), replace=False)
    hashes[copies] = hashes[rng.integers(0, len(hashes), len(copies))]
    for group in range(groups):
        mine = hashes[group * documents : (group + 1) * documents]
        rows = np.zeros(documents, KEY)
        rows["text"], rows["bytes"], rows["source"] = mine, rng.integers(50, 5_000, documents), mine % 3
        with KeyWriter(folder / f"{group:05d}", near=False) as writer:
            for start in range(0, documents, keys.BLOCK):
                writer.write(rows[start : start + keys.BLOCK])
    return Keys(folder, np.full(groups, documents))


def test_memory_for_each_document(tmp_path: Path) -> None:
    """Many documents: the plan holds a few bytes of each (a dictionary took 157)."""
    (tmp_path / "clean").mkdir()
    count = 1_000_000 if ALL else 200_000
    stored = write_keys(tmp_path / "clean", 4, count // 4, np.random.default_rng(0), 0.1)
    sources = [(name, name, "text") for name in ("a", "b", "c")]
    Gathered(np.full(4, count // 4), sources, [[0, 1, 2]] * 4).save(tmp_path)
    tracemalloc.start()
    plan.FindCopies(tmp_path, None)(None, 0, 1)
    copying = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    MakePlan(tmp_path, 0.01, 100_000, [])(None, 0, 1)
    planning = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    made = SplitPlan.load(tmp_path / "plan.json")
    distinct = len(np.unique(np.concatenate([stored.group(group)["text"] for group in range(4)])))
    assert sum(source.documents for source in made.sources.values()) == distinct == count - made.exact
    assert all(source.valid for source in made.sources.values())
    assert planning < 30 * count
    assert copying < 100 * min(
        count, duplicates.PART
    )  # a job of at most PART documents, however many there are
    assert len(jobs(10**8, near=True)) == 33 * 13


def test_held_out_documents_are_the_lowest_of_all_ranges(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    (tmp_path / "clean").mkdir()
    stored = write_keys(tmp_path / "clean", 3, 500, rng, 0)
    gathered = Gathered(
        np.full(3, 500), [(name, name, "text") for name in "abc"], [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
    )
    fates = (rng.random(1_500) < 0.3).astype(np.uint8)
    documents, sizes = plan.count_kept(gathered, stored, fates)
    for share, most in ((0.1, 10**6), (0.9, 20_000), (0.5, 900), (0.0, 100)):
        found = plan.choose_valid(gathered, stored, fates, documents, sizes, share, most)
        for number in range(3):
            whole: dict[int, int] = {}
            for group, places in enumerate(gathered.places):
                rows = stored.group(group)[fates[group * 500 : (group + 1) * 500] == 0]
                rows = rows[rows["source"] == places.index(number)]
                whole |= dict(zip(rows["text"].tolist(), rows["bytes"].tolist(), strict=True))
            assert (documents[number], sizes[number]) == (len(whole), sum(whole.values()))
            held = plan.HeldOut(len(whole), sum(whole.values()), share, most)
            ordered = sorted(whole)
            held.offer(np.array(ordered, np.uint64), np.array([whole[key] for key in ordered]))
            assert found[number] == held.chosen


def test_copies_are_the_connected_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "CHUNK", 13)
    rng = np.random.default_rng(1)
    for count, edges in ((1, 0), (50, 20), (300, 280), (2_000, 900)):
        pairs = np.sort(rng.integers(0, count, (edges, 2)), axis=1)
        exact, near = pairs[: edges // 3], pairs[edges // 3 :]
        exact = exact[exact[:, 0] != exact[:, 1]]
        both = np.concatenate([exact, near])
        first = list(range(count))
        for _ in range(count):
            before = list(first)
            for one, two in both.tolist():
                first[one] = first[two] = min(first[one], first[two])
            if first == before:
                break
        expected = [NEAR * (first[number] != number) for number in range(count)]
        for copy in exact[:, 1]:
            expected[copy] = EXACT
        found = choose_copies(count, [(exact, near[::2]), (exact[:0], near[1::2])])
        assert found.tolist() == expected


def test_a_part_reads_its_own_keys_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "BLOCK", 16)
    words = [np.array([i, i + 1, i + 2, 7, 8, 9, 10], np.uint64) for i in (1, 1, 50, 1, 90, 50, 1)] * 9
    counts = [30, 0, 33]
    for group, start in enumerate((0, 30, 30)):
        with KeyWriter(tmp_path / f"{group:05d}", near=True) as writer:
            for number in range(start, start + counts[group]):
                writer.add(int(words[number][0]) << 57, 1, 0, words[number])
    stored = Keys(tmp_path, np.array(counts))
    for parts in (1, 2, 7):
        exact = np.concatenate([exact_pairs(stored, part, parts) for part in range(parts)])
        near = np.concatenate([near_pairs(stored, 3, part, parts, 0.8) for part in range(parts)])
        for pairs in (exact, near):
            assert {int(copy) for _, copy in pairs} == set(range(63)) - {0, 2, 4}
            assert {int(first) for first, _ in pairs} == {0, 2, 4}


def test_opening_a_shard_does_not_hold_its_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1_000_000
    write_shard(tmp_path / "en", np.zeros(count), np.ones(count))
    monkeypatch.setattr(shards, "COPIED", 10_000)
    tracemalloc.start()
    assert len(Shard.open(tmp_path / "en")) == count
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    for place in (5, 10_000, 20_001, count - 1):  # also where two parts meet
        offsets = np.memmap(tmp_path / "en" / "offsets.bin", "<i8", "r+")
        kept, offsets[place] = int(offsets[place]), offsets[place - 1]
        offsets.flush()
        with pytest.raises(UserError, match=r"offsets\.bin: damaged"):
            Shard.open(tmp_path / "en")
        offsets[place] = kept
        offsets.flush()


def test_pieces_of_a_text() -> None:
    for text in ("", "short", "x" * 5_000, "word " * 3_000, "行\n" * 4_000, "é" * 700 + "\n" * 9):
        pieces = list(cut(text, 512))
        assert "".join(pieces) == text
        assert all(len(piece.encode()) <= 2 * 512 for piece in pieces)
    assert list(cut("a b", 512)) == ["a b"]
    assert all(piece.endswith(" ") for piece in list(cut("word " * 3_000, 512))[:-1])


def test_every_source_gives_the_tokenizer_about_its_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a language of few large documents, of which whole ones do not fit."""
    rng = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, letters, documents, length in (
        ("en", "abcdefgh", 300, 300),
        ("he", "אבגדהוזח", 2, 60_000),
        ("ru", "абвгдежз", 1, 90),
    ):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(documents):
                words = ["".join(rng.choices(letters, k=rng.randrange(1, 4))) for _ in range(length)]
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
    options: dict[str, Any] = {"corpus": str(folder), "vocab_size": 500, "limit_alphabet": 60}
    recipe = build(
        PrepareRecipe, {**options, "out": str(tmp_path / "out"), "tokenizer_sample_bytes": 20_000}, "x"
    )
    recipe.executor = ExecutorConfig(workers=1)
    units = recipe.units()
    steps = phases(recipe, units, claim(recipe, units))
    last = [step.name for step in steps].index("tokenizer")
    run_phases(steps[: last + 1], recipe.executor, recipe.out / "work" / "logs")
    sizes: dict[str, int] = {}
    for path in (recipe.out / "work" / "sample").iterdir():
        for row in read_cleaned(path):
            assert len(row["text"].encode()) <= 2 * piece_bytes(20_000)
            sizes[row["name"]] = sizes.get(row["name"], 0) + len(row["text"].encode())
    assert 10_000 < sizes["en"] < 30_000
    assert 10_000 < sizes["he"] < 30_000
    assert sizes["ru"] < 1_000
    vocabulary = json.loads((recipe.out / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any(len(token.strip("▁")) > 1 and set(token.strip("▁")) <= set("אבגדהוזח") for token in vocabulary)
    options["tokenizer_sample_overrides"] = {"ru": 0}
    run(tmp_path / "b", None, **options, tokenizer_sample_bytes=20_000)
    assert (
        "ru: nothing of it is in the tokenizer's sample; raise its limit (now 0)" in capsys.readouterr().err
    )
    options |= {"vocab_size": 20_000}
    with pytest.raises(UserError, match=r"of [\d,]+ in the corpus, is too small .*; raise tokenizer_sample"):
        run(tmp_path / "c", None, **options, tokenizer_sample_bytes=2_000)
