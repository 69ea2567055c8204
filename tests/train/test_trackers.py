"""TensorBoard and W&B get what metrics.jsonl gets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xverse.config import UserError
from xverse.train.plot import read_metrics
from xverse.train.trackers import WandB, tracker_errors


def test_tensorboard_has_the_figures_also_after_a_resume(
    fit_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"checkpoint_every": 3, "trackers": ["tensorboard"]}
    fit_tiny(tmp_path, steps=6, validate=lambda model: {"all": 1.5}, validate_every=2, **settings)
    for path in (tmp_path / "checkpoints").glob("step-00000006/*"):
        path.unlink()
    fit_tiny(tmp_path, steps=6, **settings)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = {r["step"] + 1: r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r}
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx(losses, rel=1e-6)
    assert {"train/tokens_per_second", "train/goodput", "checkpoint/stall_seconds", "valid/all"} <= set(
        events.Tags()["scalars"]
    )


def test_wandb_writes_a_run_without_network(
    fit_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # another test's service would write into that test's folder
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit_tiny(tmp_path, steps=3, trackers=["wandb"])
    deadline = time.monotonic() + 30
    while not (files := list(tmp_path.glob("wandb/offline-run-*/*.wandb"))):  # a process of its own writes it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (file,) = files
    run = (tmp_path / "wandb-run").read_text()
    assert run in file.name
    assert b"train/loss" in file.read_bytes()


def test_a_missing_library_says_what_to_install(
    fit_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb, which is not installed; run: pip install -e '\.\[track\]'"):
        fit_tiny(tmp_path, steps=3, trackers=["wandb"])
    assert not (tmp_path / "checkpoints").exists()


def test_a_tracker_that_fails_does_not_end_the_run(
    fit_tiny: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*values: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    fit_tiny(tmp_path, steps=3, trackers=["tensorboard"])
    assert "WARNING: tensorboard failed and gets no more figures: No space left" in capsys.readouterr().err
    assert len([r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]) == 3


def test_a_missing_login_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "netrc", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"trackers: wandb: .*WANDB_MODE=offline") as raised:
        WandB(tmp_path, 0, {})
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="report_to: No API key"), tracker_errors("report_to"):
        raise wandb.errors.UsageError("No API key\nconfigured.")
    with pytest.raises(ValueError, match="another"), tracker_errors("report_to"):
        raise ValueError("another")
