"""Folders of answers: going on after a kill, shards, reports, comparison, and wrong input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver
from xverse.cli import main

COMMAND = [sys.executable, "-c", "import sys; from xverse.cli import main; sys.exit(main())", "eval"]


def flags(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("run", "--model", str(model), "--data-dir", str(data), "--out", str(out), "--threads", "1"),
        *(more or ("--tasks", "mmlu,ceval")),
    ]


def questions(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))["questions"]


@pytest.fixture(scope="module")
def finished(random_model: Path, benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["eval", *flags(random_model, benchmarks, out)]) == 0
    return out


def test_the_report(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    (run,) = report["runs"]
    assert run["tasks"]["mmlu"]["count"] == 57 * 4
    assert run["tasks"]["ceval"]["count"] == 2 * 6
    assert len(report["questions"]) == 57 * 4 + 12
    first = report["questions"][0]
    assert set(first["logprobs"]) == set("ABCD")
    assert first["prompt"].endswith(("答案：", "Answer:"))
    right = sum(row["prediction"] == row["answer"] for row in report["questions"] if row["task"] == "mmlu")
    assert run["tasks"]["mmlu"]["value"] == pytest.approx(right / 228)
    by_subject = [entry["value"] for entry in run["tasks"]["ceval"]["subjects"].values()]
    assert run["tasks"]["ceval"]["value"] == pytest.approx(sum(by_subject) / 2)  # macro
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert "| XVERSE-7B-Chat (published) | chat | **63.7** | 55.4 | **48.9** | 57.5 | **78.2** |" in text
    shown = 100 * run["tasks"]["mmlu"]["value"]
    assert re.search(rf"\| \*\*random\*\* \| this run \| \**{shown:.1f}\** \|", text)
    assert 'tokens of " A" to " D"' in text
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_again(finished: Path, random_model: Path, benchmarks: Path, capsys: Any) -> None:
    before = (finished / "report.json").read_bytes()
    assert main(["eval", *flags(random_model, benchmarks, finished)]) == 0
    assert (finished / "report.json").read_bytes() == before


def test_other_settings_do_not_go_on(
    finished: Path, random_model: Path, benchmarks: Path, capsys: Any
) -> None:
    for more in (["--shots", "2"], ["--limit", "1"], ["--fix-none"], ["--quantize", "int8"]):
        arguments = flags(random_model, benchmarks, finished, "--tasks", "mmlu,ceval", *more)
        assert main(["eval", *arguments]) == 2
        assert "holds an evaluation with another" in capsys.readouterr().err


def test_killed_at_any_moment_it_goes_on(
    finished: Path, random_model: Path, benchmarks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = [*COMMAND, *flags(random_model, benchmarks, out)]
    for subjects in (1, 20):  # killed when so many stand there
        process = forkserver.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while len(list(out.glob("answers/*/*.jsonl"))) < subjects and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    times = {path: path.stat().st_mtime_ns for path in out.glob("answers/*/*.jsonl")}
    forkserver.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    for one, other in zip(questions(out), questions(finished), strict=True):
        assert one["id"] == other["id"]
        assert one["prediction"] == other["prediction"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)


def test_shards(finished: Path, random_model: Path, benchmarks: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "shards"
    for number in range(3):
        more = ("--tasks", "mmlu,ceval", "--shard", f"{number}/3")
        assert main(["eval", *flags(random_model, benchmarks, out, *more)]) == 0
    assert main(["eval", "report", str(out)]) == 0
    assert "| **random** | this run |" in capsys.readouterr().out
    assert [row["prediction"] for row in questions(out)] == [row["prediction"] for row in questions(finished)]


def test_precisions_and_comparison(
    finished: Path, random_model: Path, benchmarks: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "int8"
    more = ("--tasks", "mmlu,ceval", "--quantize", "int8")
    assert main(["eval", *flags(random_model, benchmarks, out, *more)]) == 0
    assert main(["eval", "report", str(finished), str(out), "--out", str(tmp_path / "both")]) == 0
    text = capsys.readouterr().out
    row = re.search(r"\| random INT8 \| INT8 \| [\d.]+ \| [\d.]+ \| ([\d.]+) % \| (-?[\d.]+) \|", text)
    assert row is not None, text
    assert float(row[1]) > 80
    assert 0 <= float(row[2]) < 0.1
    assert main(["eval", "compare", str(finished), str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| mmlu (228) |" in shown
    assert main(["eval", "compare", str(finished), str(finished)]) == 0
    assert "+0.00 (+0.00 to +0.00) | " in capsys.readouterr().out


def test_the_test_set_of_ceval_becomes_a_submission(
    random_model: Path, benchmarks: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "submission"
    more = ("--tasks", "ceval", "--split", "test")
    assert main(["eval", *flags(random_model, benchmarks, out, *more)]) == 0
    sent = json.loads((out / "ceval_submission.json").read_text(encoding="utf-8"))
    assert set(sent) == {"accountant", "law"}
    assert set(sent["law"]) == {"0", "1", "2"}
    assert set(sent["law"].values()) <= set("ABCD")


def test_malformed_rows(random_model: Path, benchmarks: Path, tmp_path: Path, capsys: Any) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(benchmarks / "ceval", data / "ceval")
    path = data / "ceval" / "val" / "law_val.csv"
    path.write_text(
        path.read_text(encoding="utf-8") + '9,"问题？",甲,乙,丙,丁,F\n8,short\n', encoding="utf-8"
    )
    more = ("--tasks", "ceval", "--limit", "2")
    assert main(["eval", *flags(random_model, data, tmp_path / "out", *more)]) == 2
    assert "law_val.csv, line 8: the answer 'F' is not one of A, B, C, D" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    more = (*more, "--skip-malformed")
    assert main(["eval", *flags(random_model, data, tmp_path / "out", *more)]) == 0
    assert "2 malformed rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--tasks", "mmul"], "mmlu"),
        (["--tasks", ","], "at least one task"),
        (["--tasks", "mmlu", "--split", "dev2"], "test, val"),
        (["--tasks", "agieval"], "`xverse eval fetch agieval`"),
        (["--tasks", "gaokao-bench"], "`xverse eval fetch gaokao-bench`"),
        (["--shots", "9"], "--shots"),
        (["--limit", "0"], "--limit"),
        (["--shard", "3/3"], "--shard"),
        (["--tasks", "mmlu", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_input(
    random_model: Path, benchmarks: Path, tmp_path: Path, capsys: Any, more: list[str], part: str
) -> None:
    try:
        code = main(["eval", *flags(random_model, benchmarks, tmp_path / "out", *more)])
    except SystemExit as stopped:  # the parser refuses values out of range
        code = stopped.code  # type: ignore[assignment]
    assert code == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reports_of_nothing(tmp_path: Path, capsys: Any) -> None:
    for text in (None, "{}", '{"model": 3}', "[1]", "{"):
        if text is not None:
            (tmp_path / "settings.json").write_text(text)
        for command in (["report"], ["compare", str(tmp_path)]):
            assert main(["eval", *command, str(tmp_path)]) == 2
            printed = capsys.readouterr().err
            assert "settings.json" in printed
            assert printed.count("\n") == 1


def test_an_output_that_is_a_file(random_model: Path, benchmarks: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["eval", *flags(random_model, benchmarks, out)]) == 2
        assert f"{out}: cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_what_was_finished(
    random_model: Path, benchmarks: Path, small_disk: Path, capsys: Any
) -> None:
    out = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(os.urandom(350_000))
    assert main(["eval", *flags(random_model, benchmarks, out)]) == 2
    assert "the disk is full" in capsys.readouterr().err
    whole = list(out.glob("answers/*/*.jsonl"))
    assert whole
    assert all(len(path.read_text(encoding="utf-8").splitlines()) in (4, 6) for path in whole)
    filler.unlink()


def test_during_training(benchmarks: Path, tiny_config: Any, tiny_tokenizer: Any) -> None:
    """It measures the model as it is now, and changes nothing of what training computes."""
    import torch

    from xverse.data.feed import Batch
    from xverse.eval.during import evaluator
    from xverse.model import XverseForCausalLM, init_weights
    from xverse.train.loop import TrainConfig, train_step

    evaluate = evaluator(["ceval"], benchmarks, limit=3, shots=1)
    batch = Batch(
        tokens=torch.arange(5, 69).reshape(2, 32),
        targets=torch.arange(6, 70).reshape(2, 32),
        document_ids=torch.zeros(2, 32, dtype=torch.long),
    )
    config = TrainConfig(steps=3, batch_size=2, learning_rate=0.1, dtype="float32")

    def losses(between: bool) -> list[float]:
        model = XverseForCausalLM(tiny_config)
        init_weights(model, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        found = []
        for _ in range(3):
            found.append(train_step(model, batch, config)[0])
            optimizer.step()
            optimizer.zero_grad()
            if between:
                figures = evaluate(model, tiny_tokenizer)
                fresh = XverseForCausalLM(tiny_config)
                fresh.load_state_dict(model.state_dict())
                assert evaluate(fresh, tiny_tokenizer) == figures
        return found

    assert losses(True) == losses(False)
