"""``xverse tokenizer``: what it writes, prints and refuses."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forkserver
from xverse.cli import main
from xverse.tokenizer import Tokenizer, native


@pytest.fixture
def corpus(tmp_path: Path, tiny_texts: list[str]) -> list[str]:
    plain, lines, packed = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"
    plain.write_bytes("\n".join(tiny_texts).encode() + b"\nbad \xff line\nlast line")
    records = [json.dumps({"text": text, "lang": "en"}) for text in tiny_texts]
    lines.write_text("\n".join([*records, "{broken"]), encoding="utf-8")
    packed.write_bytes(gzip.compress("\n".join(records).encode()))
    return [str(plain), str(lines), str(packed)]


def test_train_report_repair(tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tok"
    assert main(["tokenizer", "train", "--out", str(out), "--vocab-size", "640", *corpus]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out)
    told = " ".join(captured.err.split())  # notices wrap at the terminal's width
    assert "1 lines skipped: 1 invalid UTF-8" in told
    assert "1 invalid JSON" in told
    assert Tokenizer.load(out).vocab_size == 640

    assert main(["tokenizer", "report", "--tokenizer", str(out), "--json", *corpus]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hash"] == Tokenizer.load(out).hash
    for row in report["files"]:
        assert row["round_trip"] is True
        assert row["bytes_per_token"] == pytest.approx(row["bytes"] / row["tokens"], abs=1e-3)
        assert 0 < row["byte_fallback"] < 1
        assert row["characters"] < row["bytes"]
    assert main(["tokenizer", "report", "--tokenizer", str(out), corpus[0]]) == 0
    assert "ok" in capsys.readouterr().out

    broken = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    broken["decoder"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}
    source = tmp_path / "broken.json"
    source.write_text(json.dumps(broken), encoding="utf-8")
    assert main(["tokenizer", "repair", str(source), str(tmp_path / "fixed.json")]) == 0
    assert "repaired" in capsys.readouterr().out
    assert main(["tokenizer", "repair", str(tmp_path / "fixed.json"), str(tmp_path / "again.json")]) == 0
    assert "nothing needed repair" in capsys.readouterr().out


def test_without_compiled_code_the_library_trains(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["tokenizer", "train", "--vocab-size", "640", "--limit-alphabet", "90", "--out"]
    if native.library() is not None:
        assert main([*train, str(tmp_path / "compiled"), *corpus]) == 0
    monkeypatch.setattr(native, "library", lambda: None)
    assert main([*train, str(tmp_path / "library"), *corpus]) == 0
    assert "without xverse's compiled code" in " ".join(capsys.readouterr().err.split())
    if (tmp_path / "compiled").exists():
        assert Tokenizer.load(tmp_path / "library").hash == Tokenizer.load(tmp_path / "compiled").hash
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"corpus: {tmp_path}\nout: {tmp_path / 'out'}\n")
    assert main(["tokenizer", "train", str(recipe)]) == 2
    assert "install a compiler" in capsys.readouterr().err


def test_refusals(tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "tok")
    empty = tmp_path / "empty.txt"
    empty.touch()
    (tmp_path / "folder").mkdir()
    train = ["tokenizer", "train", "--vocab-size", "640", "--out"]
    for arguments, message in [
        ([*train, out, str(tmp_path / "none.txt")], "none.txt: no such file"),
        ([*train, out, str(tmp_path / "folder")], "no .txt or .jsonl files in this folder"),
        ([*train, out, str(empty)], "no usable text"),
        ([*train, f"{empty}/tok", corpus[0]], "cannot be written"),
        (["tokenizer", "train", "--vocab-size", "99999", "--out", out, corpus[0]], "too small"),
        (["tokenizer", "train", "--vocab-size", "20", "--out", out, corpus[0]], "no room for merges"),
        (["tokenizer", "report", "--tokenizer", out, corpus[0]], "no such file"),
        (["tokenizer", "repair", out, f"{out}2"], "no such file"),
    ]:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "Traceback" not in captured.err
        assert captured.out == ""
    assert not (tmp_path / "tok").exists()
    with pytest.raises(SystemExit) as caught:
        main([*train, out, "--wrong", corpus[0]])
    assert caught.value.code == 2
    with pytest.raises(SystemExit):
        main([*train, out, "--limit-alphabet", "-1", corpus[0]])
    assert "--limit-alphabet: -1 is out of range" in capsys.readouterr().err


def is_held(lock: Path) -> bool:
    """The file is there a moment before its lock is."""
    return lock.exists() and f":{lock.stat().st_ino} " in Path("/proc/locks").read_text()


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="locks are read from /proc")
@pytest.mark.skipif(native.library() is None, reason="recipes need the compiled part")
@pytest.mark.parametrize("by_recipe", [False, True])
def test_a_second_training_of_the_same_tokenizer_is_refused(
    tmp_path: Path, tiny_texts: list[str], by_recipe: bool
) -> None:
    out, text, recipe = tmp_path / "out" / "tok", tmp_path / "en.txt", tmp_path / "recipe.yaml"
    text.write_text("\n".join(tiny_texts * 50), encoding="utf-8")
    recipe.write_text(f"corpus: {tmp_path}\nout: {out}\nvocab_size: 640\n")
    command = [sys.executable, "-m", "xverse.cli", "tokenizer", "train"]
    command += [str(recipe)] if by_recipe else ["--vocab-size", "640", "--out", str(out), str(text)]
    lock = out / ".lock" if by_recipe else out.with_name(".tok.lock")
    with forkserver.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
        while not is_held(lock):
            assert first.poll() is None
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)
        second = forkserver.run(command, capture_output=True, text=True)
        first.send_signal(signal.SIGCONT)
        first.communicate()
    assert second.returncode == 2
    assert "another xverse tokenizer train" in second.stderr
    assert first.returncode == 0
    assert Tokenizer.load(out).vocab_size == 640
    assert not lock.exists()
