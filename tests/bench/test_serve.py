"""The measurements of the server, small."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xverse.cli import main

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")


def measured(capsys: Any, *flags: str) -> dict[str, Any]:
    assert main(["bench", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_serve(capsys: Any) -> None:
    found = measured(capsys, "serve", "--clients", "3", "--new-tokens", "12", "--rounds", "2")
    assert found["errors"] == 0
    assert len(found["rounds"]["total"]) == 2
    assert min(found[name] for name in ("offline_tok_s", "total_tok_s", "first_token_s")) > 0
    assert 0 < found["repeat_share"] < 1  # of a prompt that is known little is computed
    assert 0 < found["slowest_of_median"] <= 1


def test_soak(capsys: Any) -> None:
    found = measured(capsys, "soak", "--minutes", "0.15", "--clients", "4", "--leaving", "0.5")
    assert found["failed"] == []
    assert found["alive"]
    assert sum(found["answered"].values()) > 0
    assert sum(found["left"].values()) > 0
    assert found["blocks_held_after"] == 0
    assert found["engine_failures"] == 0


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--leaving", "2"], ["--model", "/nowhere"]])
def test_wrong_settings(capsys: Any, flags: list[str]) -> None:
    assert main(["bench", "soak", *flags]) == 2
    assert flags[1] in capsys.readouterr().err
