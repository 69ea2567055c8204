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
