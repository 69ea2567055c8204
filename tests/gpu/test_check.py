"""The script for a machine with a GPU runs: one part of it, small, on the CPU."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks.gpu import check
from xverse.config import UserError


def run(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    check.arguments(parser)
    return check.run(parser.parse_args([*argv, "--tiny", "--device", "cpu"]))


def test_parts_stand_alone_and_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("environment", "cache", "layers", "tests") == {"facts": pytest.approx(40, abs=15), "failed": 0}
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"environment", "paged attention", "a layer", "done"} <= {fact["part"] for fact in facts}
    assert all(fact.get("off", 0) < 0.05 for fact in facts)


def test_a_failing_part_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(check.PARTS, "cache", (broken, 5))
    assert run("cache", "environment")["failed"] == 1
    with pytest.raises(UserError, match="unknown part"):
        run("everything")
