"""The measurements of the server at a small size."""

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
    figures = measured(capsys, "serve", "--clients", "3", "--new-tokens", "12", "--rounds", "2")
    assert figures["errors"] == 0
    assert len(figures["rounds"]["total"]) == 2
    assert min(figures[name] for name in ("offline_tok_s", "total_tok_s", "first_token_s")) > 0
    assert 0 < figures["repeat_share"] < 1  # of a prompt that is known little is computed
    assert 0 < figures["slowest_of_median"] <= 1
