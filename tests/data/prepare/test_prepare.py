from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import forkserver
from xverse.cli import main
from xverse.config import UserError
from xverse.data.prepare.executor import ExecutorConfig
from xverse.data.prepare.inputs import corpus_units
from xverse.data.prepare.pipeline import PrepareRecipe, prepare
from xverse.data.prepare.plan import HeldOut
from xverse.data.prepare.readers import read_unit
from xverse.data.shards import Shard
from xverse.texts import ReadReport
from xverse.tokenizer import Tokenizer

# Dies by its own SIGKILL at the n-th time that something is about to land on the disk.
DYING_RUN = """
import os, signal, sys
from pathlib import Path
from xverse.data.prepare import pipeline as module
limit, count = int(sys.argv[3]), 0
def dying(function):
    def call(*arguments):
        global count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
os.replace = dying(os.replace)
here = module.ExecutorConfig(workers=1)  # in this process, where the dying functions are
recipe = module.PrepareRecipe(
    Path(sys.argv[1]), Path(sys.argv[2]), vocab_size=600, valid_share=0.1, executor=here
)
module.prepare(recipe)
"""


def recipe(corpus: Path, out: Path) -> PrepareRecipe:
    return PrepareRecipe(corpus, out, vocab_size=600, valid_share=0.1, executor=ExecutorConfig(workers=1))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(recipe(corpus, out))
    return out


def test_shards_hold_exactly_the_corpus(corpus: Path, prepared: Path) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    expected: dict[str, set[str]] = {"en": set(), "zh": set(), "code_py": set()}
    for unit in corpus_units(corpus):
        for document in read_unit(unit, ReadReport(), 1 << 20):
            expected["code_py" if document.lang == "py" else document.lang].add(document.text)
    for name, texts in expected.items():
        shards = [Shard.open(prepared / split / name) for split in ("train", "valid")]
        found = []
        for shard in shards:
            assert shard.header.tokenizer == tokenizer.hash
            assert shard.header.category == ("code" if name == "code_py" else "text")
            for i in range(len(shard)):
                ids = shard.document(i).tolist()
                assert ids[-1] == tokenizer.eos_id
                found.append(tokenizer.decode(ids[:-1]))
        assert sorted(found) == sorted(texts)
        assert sum(shard.header.text_bytes for shard in shards) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("limit", [1, 7, 15, 20, 33, 42])
def test_killed_and_run_again_gives_the_same_bytes(
    corpus: Path, prepared: Path, tmp_path: Path, limit: int
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", DYING_RUN, str(corpus), str(out)]
    killed = forkserver.run([*command, str(limit)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert tree(out) != tree(prepared)
    if limit == 15:  # and killed again in the middle of going on
        assert forkserver.run([*command, "5"], capture_output=True).returncode == -signal.SIGKILL
    shards = [path for split in ("train", "valid") for path in (out / split).glob("*/tokens.bin")]
    finished = {path: path.stat().st_mtime_ns for path in shards if (path.parent / "DONE").exists()}
    prepare(recipe(corpus, out))
    assert tree(out) == tree(prepared)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())  # none was made twice


def test_a_finished_folder_is_left_alone(corpus: Path, prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    report = prepare(recipe(corpus, prepared))
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert [row.name for row in report.sources] == ["code_py", "en", "zh"]


def test_a_second_command_on_the_same_folder_is_refused(
    corpus: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(f"corpus: {corpus}\nout: {out}\nvocab_size: 600\nvalid_share: 0.1\n")
    command = [sys.executable, "-m", "xverse.cli", "data", "prepare", str(path)]
    with forkserver.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
        while not (out / "recipe.json").exists():
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # in the middle of its work
        second = forkserver.run(command, capture_output=True, text=True)
        first.send_signal(signal.SIGCONT)
        first.communicate()
    assert second.returncode == 2
    assert second.stderr.startswith(f"xverse: {out}: another xverse data prepare is using")
    assert second.stderr.count("\n") == 1
    assert first.returncode == 0
    assert tree(out) == tree(prepared)


def test_another_recipe_is_refused(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"made by another recipe \(differs in seed\)"):
        prepare(dataclasses.replace(recipe(corpus, prepared), seed=1))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not made by"):
        prepare(recipe(corpus, tmp_path))


def test_a_changed_corpus_is_another_recipe(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    with (tmp_path / "corpus" / "both.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match="differs in files"):
        prepare(recipe(tmp_path / "corpus", prepared))


def test_duplicates_and_bad_lines_are_reported(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    folder, lines = tmp_path / "corpus", (corpus / "both.jsonl").read_bytes().splitlines()
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines[:30], b"{", b'{"text": "\xff"}']))
    (folder / "b.jsonl").write_bytes(b"\n".join(lines[20:60]))
    given = PrepareRecipe(folder, tmp_path / "out", tokenizer=prepared / "tokenizer", valid_share=0.1)
    report = prepare(given)
    assert report.duplicates == 10
    assert report.skipped == {"a.jsonl": "2 lines skipped: 1 invalid UTF-8, 1 invalid JSON"}
    assert sum(row.documents + row.valid_documents for row in report.sources) == 60
    assert sum(row.skipped_lines for row in report.sources) == 2
    assert report.tokenizer == Tokenizer.load(prepared / "tokenizer").hash


def test_broken_files_and_empty_languages_are_told(
    corpus: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lines = tmp_path / "corpus", (corpus / "both.jsonl").read_bytes()
    folder.mkdir()
    (folder / "en.jsonl").write_bytes(lines)
    (folder / "fi.jsonl").touch()
    (folder / "zh.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    path = tmp_path / "recipe.yaml"
    path.write_text(f"corpus: {folder}\nout: {tmp_path / 'out'}\ntokenizer: {prepared / 'tokenizer'}\n")
    assert main(["data", "prepare", str(path), "executor.workers=1"]) == 0
    output = capsys.readouterr()
    for told in (output.out, output.err):
        assert "\nfi.jsonl: no document in it\nzh.jsonl.gz: broken gzip stream (" in f"\n{told}"
    assert "\n\n" not in output.err
    forbid = [f"out={tmp_path / 'other'}", "allow_broken_files=false", "executor.workers=1"]
    assert main(["data", "prepare", str(path), *forbid]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "1 broken files, which allow_broken_files forbids: zh.jsonl.gz: broken gzip stream (" in told


def test_of_many_broken_files_the_first_are_told(
    corpus: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = tmp_path / "corpus", tmp_path / "recipe.yaml"
    shutil.copytree(corpus, folder)
    for number in range(25):
        (folder / f"en{number:02}.jsonl").touch()
    path.write_text(f"corpus: {folder}\nout: {tmp_path / 'out'}\ntokenizer: {prepared / 'tokenizer'}\n")
    assert main(["data", "prepare", str(path), "executor.workers=1"]) == 0
    output = capsys.readouterr()
    for told in (output.out, output.err):
        lines = told.splitlines()[-21:]
        assert lines[0] == "en00.jsonl: no document in it"
        assert lines[-1] == "and 5 more files, listed in report.md"
    assert "- en24.jsonl: no document in it" in (tmp_path / "out" / "report.md").read_text()


def test_held_out_documents_are_a_share_within_the_cap() -> None:
    def choose_valid(sizes: dict[int, int], share: float, most: int) -> set[int]:
        """Offered in two parts, as by a range of hashes after the other."""
        held = HeldOut(len(sizes), sum(sizes.values()), share, most)
        keys = sorted(sizes)
        for part in (keys[:4], keys[4:]):
            held.offer(np.array(part, np.uint64), np.array([sizes[key] for key in part], np.int64))
        return held.chosen

    sizes = dict.fromkeys(range(500), 1000)
    assert choose_valid(sizes, 0.01, 100_000) == set(range(5))
    assert len(choose_valid(sizes, 0.5, 100_000)) == 100
    assert choose_valid(sizes, 0, 100_000) == set()
    assert choose_valid({1: 5_000, **dict.fromkeys(range(2, 20), 10)}, 0.5, 100) == set(range(2, 12))
    assert choose_valid(dict.fromkeys(range(9), 10), 0.5, 100) == set()


def test_a_corpus_without_a_usable_document(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "en.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(
        UserError, match=r"no usable document in this corpus \(en.jsonl: 1 lines skipped: 1 invalid UTF-8"
    ):
        prepare(recipe(folder, tmp_path / "out"))


def test_the_command(
    corpus: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"corpus: {corpus}\nout: {tmp_path / 'out'}\ntokenizer: {prepared / 'tokenizer'}\n")
    assert main(["data", "prepare", str(path), "valid_share=0.1"]) == 0
    output = capsys.readouterr().out
    assert "code_py" in output
    assert "3 sources, " in output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["duplicates"] == 0
    assert main(["data", "show", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "zh" in output
    assert "tokens" in output
    assert "drawn among 1,000,000 simulated sequences: every share within 0.0000 points" in output
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("languages: {zh: 0.5, en: 0.5}\ncategories: {text: 0.9, code: 0.1}\n")
    assert main(["data", "show", str(tmp_path / "out"), "--mixture", str(mixture)]) == 0
    assert "zh  45.00 %" in capsys.readouterr().out
    assert main(["data", "prepare", str(path), "valid_shar=0.1"]) == 2
    assert "unknown key 'valid_shar'; did you mean 'valid_share'?" in capsys.readouterr().err
    assert main(["data", "prepare", str(path), "valid_share=2"]) == 2
    assert "valid_share 2.0 is not between 0 and 1" in capsys.readouterr().err
    assert main(["data", "show"]) == 2
    assert main(["data", "show", str(tmp_path / "nowhere")]) == 2


def test_real_corpus(test_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    shutil.copy(test_data / "corpus" / "ta.jsonl.gz", folder)
    report = prepare(
        PrepareRecipe(
            folder, tmp_path / "out", vocab_size=1_000, limit_alphabet=200, tokenizer_sample_bytes=100_000
        )
    )
    (row,) = report.sources
    assert row.documents > 400
    assert 0 < row.valid_documents < 50
    assert row.text_bytes > 2_000_000
