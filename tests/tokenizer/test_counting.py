"""Counting words out of core: what is counted, how it is resumed, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests import forkserver
from tests.pre_tokens import pre_tokens
from xverse import texts
from xverse.config import UserError
from xverse.tokenizer import counting, native
from xverse.tokenizer.counting import count_words, split_into_parts

pytestmark = pytest.mark.skipif(native.library() is None, reason="the compiled part was not built")
MEMORY = 1 << 22

PROGRAM = """
import sys
from pathlib import Path
from xverse.tokenizer import counting
counting.SMALLEST_PART = 1 << 16
files = [Path(name) for name in sys.argv[2:]]
print(counting.count_words(files, Path(sys.argv[1]), memory=1 << 20, threads=2))
"""


@pytest.fixture
def corpus(tmp_path: Path, tiny_texts: list[str]) -> list[Path]:
    plain, lines, packed = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"
    plain.write_text("\n".join(tiny_texts * 20), encoding="utf-8")
    records = "\n".join(json.dumps({"text": text}) for text in tiny_texts)
    lines.write_text(records, encoding="utf-8")
    packed.write_bytes(gzip.compress(records.encode()))
    return [plain, lines, packed]


def read_counts(path: Path) -> Counter[str]:
    """The file's form, read apart from the code that writes it."""
    data, at = path.read_bytes(), 0
    counts: Counter[str] = Counter()

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        size, count = varint(), varint()
        word = data[at : at + size].decode()
        at += size
        assert word not in counts
        counts[word] = count
    return counts


def expected(files: list[Path]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for path in files:
        for text in texts.read_texts(path, texts.ReadReport()):
            counts.update(pre_tokens(text.decode()))
    return counts


def test_counts_and_their_bytes_do_not_depend_on_threads_or_memory(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "SMALLEST_PART", 1 << 14)
    monkeypatch.setattr(counting, "FAN_IN", 2)  # several levels of merging
    first = count_words(corpus, tmp_path / "one", memory=1 << 16, threads=1)
    second = count_words(corpus, tmp_path / "two", memory=1 << 28, threads=3)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "counting.json",
        "words",
        "words.json",
    ]
    counts = read_counts(first.path)
    assert first.different == len(counts)
    assert first.occurrences == counts.total()
    # Parts begin at line ends, which can cut a run of them in two: there alone the counts may differ.
    for word, count in (counts - expected(corpus) | expected(corpus) - counts).items():
        assert not word.strip(), (word, count)


def test_a_small_table_spills_and_merges(tmp_path: Path) -> None:
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(9000)]
    text = " ".join(words * 3).encode()
    counter = native.Counter(tmp_path / "run", 1 << 16)
    for begin in range(3):
        counter.add([text[begin:]])
    _, _, runs = counter.finish()
    counter.close()
    assert runs > 1
    native.merge_words([tmp_path / f"run.{index}" for index in range(runs)], tmp_path / "all")
    assert read_counts(tmp_path / "all") == sum(
        (Counter(pre_tokens(text[begin:].decode())) for begin in range(3)), Counter()
    )


def test_killed_counting_goes_on(tmp_path: Path, tiny_texts: list[str]) -> None:
    generator = random.Random(5)
    for number in range(4):
        lines = [" ".join(generator.choices(tiny_texts, k=3)) + str(generator.random()) for _ in range(1000)]
        (tmp_path / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    files = sorted(tmp_path.glob("*.txt"))
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(out), *map(str, files)]
        return forkserver.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.communicate()
    for wanted in (1, 4):  # parts that are complete when the process is killed
        process = start(tmp_path / "killed")
        while process.poll() is None and len(list((tmp_path / "killed").glob("part-*.json"))) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("part-*.json")}
    last = start(tmp_path / "killed")
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert (tmp_path / "killed" / "words").read_bytes() == (tmp_path / "whole" / "words").read_bytes()
    assert done or (tmp_path / "killed" / "words.json").exists()
    again = count_words(files, tmp_path / "killed", memory=MEMORY, threads=1)
    assert str(again) == out.strip()


def test_parts_that_are_done_are_not_counted_again(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "SMALLEST_PART", 1 << 14)
    folder = tmp_path / "out"

    def interrupt(runs: list[Path], folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(counting, "_merge_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            count_words(corpus, folder, memory=MEMORY, threads=2)
    markers = sorted(folder.glob("part-*.json"))
    assert len(markers) > 3
    markers[1].unlink()
    next(folder.glob("part-00002.0")).write_bytes(b"")  # cut short: done again too
    counted: list[int] = []
    real = native.Counter

    class Recorded(real):  # type: ignore[misc, valid-type]
        def __init__(self, prefix: Path, memory: int) -> None:
            counted.append(int(prefix.name[-5:]))
            super().__init__(prefix, memory)

    monkeypatch.setattr(native, "Counter", Recorded)
    result = count_words(corpus, folder, memory=MEMORY, threads=1)
    assert counted == [1, 2]
    assert (
        result.path.read_bytes()
        == count_words(corpus, tmp_path / "other", memory=MEMORY, threads=1).path.read_bytes()
    )


def test_other_texts_are_refused(tmp_path: Path, corpus: list[Path]) -> None:
    count_words(corpus, tmp_path / "out", memory=MEMORY, threads=1)
    with pytest.raises(UserError, match="other texts"):
        count_words(corpus[:1], tmp_path / "out", memory=MEMORY, threads=1)
    with pytest.raises(UserError, match="holds no word counts"):
        count_words(corpus, tmp_path, memory=MEMORY, threads=1)


def test_disk_full_is_one_line_and_goes_on(tmp_path: Path, corpus: list[Path]) -> None:
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from xverse.config import UserError\n"
        "from pathlib import Path\n"
        "from xverse.tokenizer.counting import count_words\n"
        "try: count_words([Path(n) for n in sys.argv[2:]], Path(sys.argv[1]), memory=1 << 22, threads=1)\n"
        "except UserError as error: print(error)\n"
    )
    done = forkserver.run(
        [sys.executable, "-c", program, str(tmp_path / "out"), *map(str, corpus)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the disk is full" in done.stdout, done.stderr
    assert count_words(corpus, tmp_path / "out", memory=MEMORY, threads=1).different > 100


def test_what_cannot_be_used_is_told_by_file(
    tmp_path: Path, corpus: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "d.jsonl.gz"
    cut.write_bytes(corpus[2].read_bytes()[:-200])
    odd = tmp_path / "e.jsonl"
    odd.write_bytes(b'{"text": "good"}\n{broken\n{"text": "\\ud800"}\n[1]\n\xff\n')
    result = count_words([cut, odd], tmp_path / "out", memory=MEMORY, threads=1)
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"{cut}: broken gzip stream" in told.replace(" d.jsonl", "d.jsonl")
        or "d.jsonl.gz: broken gzip" in told
    )
    assert "1 invalid JSON" in told
    assert "2 invalid UTF-8" in told
    assert read_counts(result.path)["good"] == 1


def test_long_lines_and_long_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.read_jsonl, "__defaults__", (None, 1 << 12, None))
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("龘" * 2_000_000 + " end\nnext", encoding="utf-8")  # one line of 6 MB, one word
    lines.write_text(
        json.dumps({"text": "x " * 9000}) + "\n" + json.dumps({"text": "short"}), encoding="utf-8"
    )
    skipped = texts.ReadReport()
    blocks = list(texts.read_texts(plain, skipped))
    assert b"".join(blocks) == plain.read_bytes()
    assert max(map(len, blocks)) < 1.2 * (1 << 20)
    counts = count_words([plain, lines], tmp_path / "out", memory=MEMORY, threads=1)
    assert counts.long_words == len([block for block in blocks if len(block) > native.LONGEST_WORD])
    assert set(read_counts(counts.path)) >= {" end", "\n", "next", "short"}
    assert "x" not in read_counts(counts.path)


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 16, 1 << 20])
def test_spans_cover_a_file_once(tmp_path: Path, tiny_texts: list[str], size: int) -> None:
    path = tmp_path / "a.txt"
    data = "\n".join(tiny_texts[:20]).encode() + b"\n\n\nlast"
    path.write_bytes(data)
    parts = split_into_parts([path], size)
    read = [
        text
        for part in parts
        for span in part
        for text in texts.read_texts(span.path, texts.ReadReport(), span.begin, span.end)
    ]
    assert b"".join(read) == data


def test_small_files_share_a_part(tmp_path: Path) -> None:
    files = []
    for number in range(10):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text('{"text": "a"}\n')
    parts = split_into_parts(files, 50)
    assert [span.path for part in parts for span in part] == files
    assert {len(part) for part in parts[:-1]} == {4}
