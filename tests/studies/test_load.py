"""The study ``load`` at the smallest shape."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.studies import load
from benchmarks.studies.common import check_space
from xverse.config import UserError


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load(tmp_path: Path) -> None:
    figures = load.measure("nano", tmp_path)
    for kind in load.FORMATS:
        assert figures[kind]["weight_bytes"] == 2 * 11_406_592
        # 1.05 is for 7B; at nano the code pages that loading touches weigh a fifth as much as the model
        above = figures[kind]["peak_bytes"] - figures[kind]["baseline_bytes"]
        assert above <= 1.05 * figures[kind]["weight_bytes"] + 16e6
    assert not list(tmp_path.iterdir())


def test_load_needs_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1020000000.0 GB of disk, .* GB are free in .*--directory"):
        check_space(tmp_path, 10**18)
