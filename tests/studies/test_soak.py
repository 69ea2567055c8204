"""The study ``soak``, for seconds instead of minutes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.__main__ import main

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")


def measured(capsys: Any, *flags: str) -> dict[str, Any]:
    assert main(flags) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.thorough
def test_soak(capsys: Any) -> None:
    figures = measured(capsys, "soak", "--minutes", "0.15", "--clients", "4", "--leaving", "0.5")
    assert figures["failed"] == []
    assert figures["alive"]
    assert sum(figures["answered"].values()) > 0
    assert sum(figures["left"].values()) > 0
    assert figures["blocks_held_after"] == 0
    assert figures["engine_failures"] == 0


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--leaving", "2"], ["--model", "/nowhere"]])
def test_wrong_settings(capsys: Any, flags: list[str]) -> None:
    assert main(["soak", *flags]) == 2
    assert flags[1] in capsys.readouterr().err
