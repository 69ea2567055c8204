"""Files at URLs: listed and read as local ones, with retries; and refused where only a path works."""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.object_store import object_store
from xverse import remote
from xverse.cli import FREE, VERBS, Parser, main
from xverse.config import UserError, build, is_url
from xverse.data.prepare.inputs import Input, corpus_units, input_units
from xverse.data.prepare.readers import read_unit
from xverse.files import atomic_directory, atomic_file
from xverse.finetune.settings import read_settings
from xverse.hub.resolve import resolve
from xverse.texts import ReadReport

ROWS = [{"text": f"text {number} 文", "lang": "en"} for number in range(300)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every format."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    folder = tmp_path_factory.mktemp("files")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "d.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "e.parquet")
    (folder / "f.csv").write_text("text,lang\n" + "".join(f"{row['text']},en\n" for row in ROWS))
    (folder / "g.txt").write_text("".join(row["text"] + "\n" for row in ROWS), encoding="utf-16")
    (folder / "h.warc").write_bytes(_archive())
    return folder


def _archive() -> bytes:
    import io

    from warcio.warcwriter import WARCWriter

    buffer = io.BytesIO()
    for row in ROWS:
        writer = WARCWriter(buffer, gzip=False)
        record = writer.create_warc_record("x:y", "conversion", payload=io.BytesIO(row["text"].encode()))
        writer.write_record(record)
    return buffer.getvalue()


def texts(**given: Any) -> list[str]:
    report = ReadReport()
    units = input_units([Input(**given)])
    found = [document.text for unit in units for document in read_unit(unit, report, 10_000)]
    assert not report.describe()
    return found


def check(base: str, files: Path) -> None:
    """Every format is read from a URL, alone and by pattern, and listed as a corpus."""
    expected = [row["text"] for row in ROWS]
    for path in sorted(files.iterdir()):
        lines = {"lines": True} if path.suffix == ".txt" else {}
        assert texts(path=f"{base}/{path.name}", **lines) == expected, path.name
    if not base.startswith("http"):
        assert texts(path=f"{base}/*.jsonl*") == expected * 3
        assert len(texts(path=base, lines=True)) == 8 * len(ROWS)
        names = [(unit.name, unit.lang, unit.size) for unit in corpus_units(base)]
        listed = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
        assert names == [(name, name[0], (files / name).stat().st_size) for name in listed]
        with pytest.raises(UserError, match="no text files here"):
            texts(path=f"{base}/*.nothing")
    with pytest.raises(UserError, match=r"no such file|no text files here"):
        texts(path=f"{base}/nothing.jsonl")


@pytest.fixture
def memory(files: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.put(str(files), "/corpus", recursive=True)
    yield "memory://corpus"
    store.rm("/corpus", recursive=True)


def test_a_store_in_memory(memory: str, files: Path) -> None:
    check(memory, files)


class _Server(ThreadingHTTPServer):
    folder: Path
    cuts = 0  # answers that still break off in the middle
    ranges = True
    status = 404  # of what is not there


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(self.server.status)
            return
        data, total = path.read_bytes(), path.stat().st_size
        wanted = self.headers.get("Range") if self.server.ranges else None
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last or total) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            if self.server.cuts and len(data) > 200:
                self.server.cuts -= 1
                self.wfile.write(data[:100])
                self.close_connection = True
                return
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as running:
        running.folder = files
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_that_breaks_off(
    server: _Server, files: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    server.ranges = ranges
    base = f"http://127.0.0.1:{server.server_port}"
    expected = [row["text"] for row in ROWS]
    for name in ("a.jsonl", "b.jsonl.gz", *(("e.parquet",) if ranges else ())):
        server.cuts = 2
        assert texts(path=f"{base}/{name}?token=x*y") == expected
        assert server.cuts == 0
    server.cuts = 100
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \("):
        texts(path=f"{base}/a.jsonl")
    server.cuts = 0
    if ranges:
        check(base, files)


@pytest.mark.parametrize(
    ("status", "why"),
    [(404, "no such file"), (403, "no permission"), (401, "no permission"), (500, "500"), (503, "503")],
)
def test_a_failing_web_server_is_not_a_missing_file(
    server: _Server, monkeypatch: pytest.MonkeyPatch, status: int, why: str
) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(server, "status", status)
    with pytest.raises(UserError, match=rf"nothing\.jsonl: .*{why}"):
        texts(path=f"http://127.0.0.1:{server.server_port}/nothing.jsonl")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/a\.jsonl: cannot be read \(.*connect"):
        texts(path="http://127.0.0.1:1/a.jsonl")


def test_protocols_in_capitals(memory: str) -> None:
    assert texts(path=f"{memory}/a.jsonl".replace("memory", "MEMORY")) == [row["text"] for row in ROWS]


def test_an_object_store(files: Path) -> None:
    with object_store() as store:
        store.files.put(str(files) + "/", "bucket/corpus/", recursive=True)
        check("s3://bucket/corpus", files)


def test_model_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XVERSE_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for name in ("config.json", "tokenizer.json", "model.safetensors", "code.py"):
        store.pipe(f"/models/tiny/{name}", b"1")
    store.pipe("/models/tiny/deeper/config.json", b"3")
    folder = resolve("memory://models/tiny/")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "xverse_source.json",
    }
    made = folder.stat().st_ino
    assert resolve("memory://models/tiny") == folder
    assert folder.stat().st_ino == made
    store.pipe("/models/tiny/model.safetensors", b"22")
    assert (resolve("memory://models/tiny") / "model.safetensors").read_bytes() == b"22"
    for url, why in (
        ("memory://models/none", "no model directory here"),
        ("memory://models/tiny/deeper", "the repository has no weights"),
        ("nosuch://models/tiny", "unknown protocol 'nosuch'"),
    ):
        with pytest.raises(UserError, match=why):
            resolve(url)
    store.rm("/models", recursive=True)


URLS = (
    "s3://bucket/x",
    "oss://b/x",
    "hdfs:///x",
    "gs://b/x",
    "https://h/x",
    "hf://datasets/a/b",
    "file:///tmp/x",
)


def actions(parser: argparse.ArgumentParser, verb: list[str]) -> Iterator[tuple[list[str], argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from actions(below, [*verb, name])
        elif action.nargs != 0:
            yield verb, action


def test_no_flag_takes_a_url_for_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    walked = 0
    for verb in VERBS:
        parser = Parser(prog=verb)
        importlib.import_module(f"xverse.commands.{verb}").arguments(parser)
        for _, action in actions(parser, [verb]):
            if action.type not in (None, str, Path) or action.metavar in FREE or action.choices:
                continue
            walked += 1
            for url in URLS:
                with pytest.raises(argparse.ArgumentError, match="is a URL, and only a path"):
                    parser._get_value(action, url)
    assert walked > 30
    assert not list(tmp_path.iterdir())


def test_no_key_takes_a_url_for_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xverse.data.mixture import MixtureConfig
    from xverse.data.prepare.pipeline import PrepareRecipe
    from xverse.tokenizer.recipe import TokenizerRecipe

    monkeypatch.chdir(tmp_path)
    for url in URLS:
        for cls, keys in (
            (PrepareRecipe, ("tokenizer",)),
            (TokenizerRecipe, ("corpus", "out", "counts")),
            (MixtureConfig, ("file",)),
        ):
            for key in keys:
                with pytest.raises(UserError, match=f"{key}: '{url}' is a URL"):
                    build(cls, {key: url}, "recipe")
        for key in ("dataset", "eval_dataset", "dataset_dir", "adapter_name_or_path", "deepspeed"):
            values = {"model_name_or_path": "nano", "output_dir": "x", "dataset": "y", key: url}
            with pytest.raises(UserError, match="is a URL"):
                read_settings(values, "recipe")
        for write in (atomic_file, atomic_directory):  # and what a library's user passes
            with pytest.raises(UserError, match="is a URL"), write(Path(url)):
                pass
    assert not list(tmp_path.iterdir())


def test_what_is_no_url() -> None:
    names = ("", "a/b", "/a", "./s3:x", "C:/x", "org/name", "modelscope:org/name", "a:b", 3)
    assert not any(map(is_url, names))
    assert all(is_url(Path(url)) for url in URLS)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("corpus: nowhere\nout: out\n")
    assert main(["data", "prepare", "recipe.yaml", "tokenizer=s3://bucket/out"]) == 2
    assert capsys.readouterr().err.startswith("xverse: recipe.yaml: tokenizer: 's3://bucket/out' is a URL")
    assert main(["data", "prepare", "recipe.yaml", "corpus=.", "out=https://h/out"]) == 2
    assert "a web server can only be read" in capsys.readouterr().err
    assert main(["data", "prepare", "recipe.yaml", "corpus=nosuch://bucket/out"]) == 2
    assert "unknown protocol 'nosuch'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
