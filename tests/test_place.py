"""Folders at URLs: complete or recognisably not, whatever fails on the way; copied once and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from tests.object_store import ObjectStore, object_store
from tests.test_remote import _Handler, _Server
from xverse import place, remote
from xverse.cli import main
from xverse.config import UserError
from xverse.data.prepare.pipeline import PrepareRecipe, prepare
from xverse.files import fingerprint
from xverse.formats import load_model, save_hf
from xverse.hub.resolve import resolve
from xverse.place import MARKS, Place, fetch


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XVERSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    for name in ("config.json", "a.bin", "deeper/b.bin", "deeper/.metadata"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(name.encode() * 1000)
    (made / ".x.tmp").write_bytes(b"left by a killed program")
    return made


NAMES = {"config.json", "a.bin", "deeper/b.bin", "deeper/.metadata"}


@pytest.mark.parametrize("base", ["s3://bucket", "memory://top", "file://{tmp}/store", "local://{tmp}/store"])
def test_sent_and_copied(base: str, folder: Path, tmp_path: Path, store: ObjectStore, capsys: Any) -> None:
    url = f"{base.format(tmp=tmp_path)}/sent"
    Place(folder, url).send()
    assert set(remote.listing(url)) == NAMES | {MARKS}
    assert {name: mark[0] for name, mark in place.read_list(url).items()} == {
        name: len(name) * 1000 for name in NAMES
    }
    copied = fetch(url, lambda names: [name for name in names if name != "a.bin"], "models")
    assert not (copied / "a.bin").exists()
    assert fetch(url, list, "models") == copied
    assert all(fingerprint(copied / name) == fingerprint(folder / name) for name in NAMES)
    assert capsys.readouterr().err.count("copied to") == 2
    fetch(url, list, "models")
    assert not capsys.readouterr().err

    (folder / "a.bin").unlink()  # sent again: what is gone here goes there and in copies
    (folder / "config.json").write_text("other")
    Place(folder, url).send()
    assert set(remote.listing(url)) == NAMES - {"a.bin"} | {MARKS}
    fetch(url, list, "models")
    assert (copied / "config.json").read_text() == "other"
    assert not (copied / "a.bin").exists()


def test_a_failure_at_any_file_leaves_no_complete_folder(
    folder: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a first time nor when an older folder is replaced."""
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(type(store.files), "retries", 1)
    url = "s3://bucket/cut"
    for replaced in (False, True):
        for number in range(len(NAMES) + 1):
            seen: list[str] = []

            def fails(method: str, path: str, number: int = number, seen: list[str] = seen) -> bool:
                seen += [path] if method == "PUT" else []
                return method == "PUT" and len(seen) > number

            store.reset()
            Place(folder, url).send() if replaced else remote.remove(url)
            store.matches, store.failures = fails, 100
            with pytest.raises(UserError, match="cannot be written"):
                Place(folder, url).send()
            store.reset()
            assert not place.read_list(url)
            if number < len(NAMES):
                assert "config.json" not in remote.listing(url), "without it nothing reads the folder"


def test_errors_that_pass(folder: Path, store: ObjectStore) -> None:
    store.failures = 3
    Place(folder, "s3://bucket/slow").send()
    assert store.answered == 3
    store.failures = 3
    copied = fetch("s3://bucket/slow", list, "models")
    assert store.answered == 6
    assert fingerprint(copied / "a.bin") == fingerprint(folder / "a.bin")


def test_damage_and_names_that_leave_the_folder(folder: Path, store: ObjectStore, tmp_path: Path) -> None:
    Place(folder, "s3://bucket/bad").send()
    store.files.pipe("bucket/bad/a.bin", b"x" * 5000)
    with pytest.raises(UserError, match=r"a\.bin: has another size or SHA-256 than was recorded"):
        fetch("s3://bucket/bad", list, "models")
    outside = {"files": {"../../outside": [1, "0"]}}
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MARKS).write_text(json.dumps(outside))
    with (
        web(tmp_path / "web") as url,
        pytest.raises(UserError, match=r"has a file named '\.\./\.\./outside'"),
    ):
        fetch(url, list, "models")


def web(folder: Path) -> Any:
    import contextlib
    import threading

    @contextlib.contextmanager
    def serving() -> Iterator[str]:
        with _Server(("127.0.0.1", 0), _Handler) as running:
            running.folder = folder
            threading.Thread(target=running.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{running.server_port}"
            running.shutdown()

    return serving()


def test_models_are_exported_to_a_url_and_read_there(
    store: ObjectStore, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, capsys: Any, monkeypatch: Any
) -> None:
    base, url = tmp_path / "base", "s3://bucket/exported"
    save_hf(tiny_model, tiny_tokenizer, base, torch.float32)
    export = ["export", "--model", str(base), "--format"]
    assert main([*export, "hf", "--out", url]) == 0
    assert f"sent to {url}" in capsys.readouterr().err
    assert main([*export, "hf", "--out", url]) == 2
    assert f"{url}: already holds files; --overwrite replaces them" in capsys.readouterr().err
    store.matches, store.failures = lambda method, path: method == "PUT", 10**6
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    assert main([*export, "hf", "--out", url, "--overwrite"]) == 2
    kept = capsys.readouterr().err.rpartition("is complete in ")[2].strip()
    assert (Path(kept) / "model.safetensors").exists()
    store.reset()
    assert main([*export, "hf", "--out", url, "--overwrite"]) == 0
    assert main([*export, "gguf", "--out", f"{url}.gguf"]) == 0
    assert "exported.gguf" in {name.rpartition("/")[2] for name in store.files.find("bucket")}
    assert main(["export", "--model", url, "--format", "llama", "--out", "https://h/x"]) == 2
    assert "can only be read" in capsys.readouterr().err
    expected = tiny_model.state_dict()

    def same(model: str) -> None:
        found = load_model(resolve(model)).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    same(url)
    assert not any((tmp_path / "cache" / "places").iterdir()), "nothing is left of what was sent"
    plain = tmp_path / "plain"  # a web server's, with a list of files and without one, whole and in parts
    shutil.copytree(base, plain)
    with web(plain) as address:
        same(address)
    save_hf(tiny_model, tiny_tokenizer, plain, torch.float32, max_shard_bytes=100_000, overwrite=True)
    assert len(list(plain.glob("*.safetensors"))) > 1
    with web(plain) as address:
        same(address)
    Place(base, "memory://listed").send()
    fsspec.filesystem("memory").get("/listed", str(tmp_path / "listed"), recursive=True)
    with web(tmp_path / "listed") as address:
        same(address)
        with pytest.raises(UserError, match="no model directory here"):
            resolve(f"{address}/nothing")


def test_data_is_prepared_at_a_url(
    store: ObjectStore, tmp_path: Path, tiny_texts: list[str], capsys: Any
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [{"text": f"{text} {i}", "lang": "en"} for i, text in enumerate(tiny_texts * 2)]
    (corpus / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url = "s3://bucket/prepared"
    report = prepare(PrepareRecipe(corpus, url, vocab_size=400, valid_share=0.1))
    assert {"report.json", MARKS, "train/en/DONE", "tokenizer/tokenizer.json"} <= store.names("prepared")
    assert not any(name.startswith("work/") for name in store.names("prepared"))
    assert main(["data", "show", url]) == 0
    shutil.rmtree(tmp_path / "cache")  # another machine
    capsys.readouterr()
    assert prepare(PrepareRecipe(corpus, url, vocab_size=400, valid_share=0.1)) == report
    assert f"{url}: complete, nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="made by another recipe"):
        prepare(PrepareRecipe(corpus, url, vocab_size=500, valid_share=0.1))
