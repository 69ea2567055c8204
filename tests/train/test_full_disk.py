"""A full disk costs no step that a checkpoint could hold, on real file systems of that size."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from xverse.config import UserError
from xverse.log import JsonlLog
from xverse.train.checkpoint import kept
from xverse.train.plot import read_metrics


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def pages(folder: Path) -> int:
    """Bytes in whole pages, as a tmpfs stores them."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(("room", "fitting"), [(2.6, 2), (1.6, 1)])
def test_the_oldest_checkpoint_makes_room_for_the_next(
    fit_tiny: Callable[..., object], small_disk: Path, tmp_path: Path, room: float, fitting: int
) -> None:
    """A disk for two checkpoints, and for one; the run would keep three."""
    settings = {"steps": 12, "checkpoint_every": 3, "keep_checkpoints": 3}
    fit_tiny(tmp_path / "whole", **settings)
    one = pages(tmp_path / "whole" / "checkpoints" / "step-00000012")
    subprocess.run(["mount", "-o", f"remount,size={int(room * one)}", str(small_disk)], check=True)
    out = small_disk / "run"
    aside = out / "checkpoints" / "damaged-step-00000099"
    aside.mkdir(parents=True)
    (aside / "shard").write_bytes(bytes(4096))
    fit_tiny(out, **settings)
    steps = [int(path.name[5:]) for path in kept(out).all()]
    assert (len(steps), steps[-1]) == (fitting, 12)
    assert steps[0] > 3, "the oldest went first"
    assert not aside.exists()
    assert losses(out) == losses(tmp_path / "whole")
    fit_tiny(out, **settings)  # the last one is intact


def test_checkpoints_that_are_kept_forever_go_last(
    fit_tiny: Callable[..., object], small_disk: Path, tmp_path: Path
) -> None:
    settings = {"steps": 8, "checkpoint_every": 2, "keep_every": 2}
    fit_tiny(tmp_path / "whole", **settings)
    one = pages(tmp_path / "whole" / "checkpoints" / "step-00000008")
    subprocess.run(["mount", "-o", f"remount,size={int(2.6 * one)}", str(small_disk)], check=True)
    fit_tiny(small_disk / "run", **settings)
    names = [path.name for path in kept(small_disk / "run").all()]
    assert names == ["step-00000004", "step-00000008"], "6 was not written while 2 and 4 were kept"


def test_a_disk_too_small_for_any_checkpoint_is_named(
    fit_tiny: Callable[..., object], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=100k", str(small_disk)], check=True)
    with pytest.raises(UserError, match="step-00000004: No space left on device; nothing was written"):
        fit_tiny(small_disk / "run", steps=4, checkpoint_every=2)
    assert "step-00000002 was not saved (No space left on device); training continues" in " ".join(
        capsys.readouterr().err.split()
    )


def test_records_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "metrics.jsonl"
    file.symlink_to("/dev/full")
    log = JsonlLog(file)
    for step in range(3):
        log.write({"step": step})
    assert capsys.readouterr().err.count("No space left on device") == 1
    file.unlink()
    log._file.close()
    log._file = file.open("ab", buffering=0)  # as if there were room now
    log.write({"step": 3})
    log.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]
