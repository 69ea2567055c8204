"""Fetching from a server on loopback that stands for the hub and GitHub."""

from __future__ import annotations

import functools
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xverse.cli import main
from xverse.config import UserError
from xverse.eval import fetch


@pytest.fixture
def homes(benchmarks: Path, tmp_path: Path) -> Iterator[tuple[dict[str, fetch.Set], Path]]:
    """The sets of the small benchmarks as their homes offer them, and the folder that is served."""
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "data.tar", "w") as archive:
        archive.add(benchmarks / "mmlu" / "data", "data")
        note = tarfile.TarInfo("data/README.txt")
        note.size = 5
        archive.addfile(note, io.BytesIO(b"hello"))
    with zipfile.ZipFile(served / "exam.zip", "w") as archive:
        for path in sorted((benchmarks / "ceval").rglob("*.csv")):
            archive.write(path, path.relative_to(benchmarks / "ceval").as_posix())
    (served / "subject_mapping.json").write_bytes(
        (benchmarks / "ceval" / "subject_mapping.json").read_bytes()
    )
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    handler.log_message = lambda *arguments: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    sets = {
        "mmlu": fetch.Set(
            homes=(fetch.Home(url=f"{url}/data.tar", within="data", into="data"),),
            digest=fetch.digest_of(benchmarks / "mmlu", "mmlu"),
            licence="MIT",
        ),
        "ceval": fetch.Set(
            homes=(
                fetch.Home(url=f"{url}/exam.zip"),
                fetch.Home(url=url + "/{name}", names=("subject_mapping.json",)),
            ),
            digest=fetch.digest_of(benchmarks / "ceval", "ceval"),
            licence="CC",
        ),
    }
    yield sets, served
    server.shutdown()


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_what_arrives_is_what_stood_there(homes: Any, benchmarks: Path, tmp_path: Path) -> None:
    sets, _ = homes
    target = tmp_path / "got"
    assert len(list(fetch.fetch([], target, sets))) == 2
    assert files(target) == files(benchmarks)  # and no README.txt, which no benchmark reads
    assert all("already downloaded" in line for line in fetch.fetch([], target, sets))


def test_another_file_than_expected_is_refused(homes: Any, benchmarks: Path, tmp_path: Path) -> None:
    sets, served = homes
    (served / "subject_mapping.json").write_text("{}", encoding="utf-8")
    target = tmp_path / "got"
    with pytest.raises(UserError, match="have digest"):
        list(fetch.fetch(["ceval"], target, sets))
    assert not list(target.iterdir())


def test_a_changed_copy_is_noticed(homes: Any, tmp_path: Path) -> None:
    sets, _ = homes
    target = tmp_path / "got"
    list(fetch.fetch(["ceval"], target, sets))
    (target / "ceval" / "subject_mapping.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="remove it to fetch them again"):
        list(fetch.fetch(["ceval"], target, sets))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("data.tar", b"no archive", "not an archive, or a damaged one"),
        ("data.tar", None, "cannot be fetched"),
    ],
)
def test_broken_homes(homes: Any, tmp_path: Path, name: str, content: bytes | None, part: str) -> None:
    sets, served = homes
    (served / name).unlink()
    if content is not None:
        (served / name).write_bytes(content)
    with pytest.raises(UserError, match=part):
        list(fetch.fetch(["mmlu"], tmp_path / "got", sets))
    assert not (tmp_path / "got" / "mmlu").exists()


def test_archives_cannot_write_elsewhere(homes: Any, tmp_path: Path) -> None:
    sets, served = homes
    with zipfile.ZipFile(served / "exam.zip", "w") as archive:
        archive.writestr("../_...csv", "x")
    with pytest.raises(UserError, match="outside its folder"):
        list(fetch.fetch(["ceval"], tmp_path / "got", sets))
    assert not (tmp_path / "_...csv").exists()


def test_the_shipped_digests_are_those_of_the_real_data(test_data: Path) -> None:
    for name, each in fetch.SETS.items():
        assert fetch.digest_of(test_data / "eval" / name, name) == each.digest


def test_unknown_sets(tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", "fetch", "mmul", "--data-dir", str(tmp_path)]) == 2
    assert "mmlu" in capsys.readouterr().err
