"""Tasks that are no multiple choice, the sandbox, and benchmarks of the user's own."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.cli import main
from xverse.config import UserError
from xverse.data.benchmarks import humaneval
from xverse.data.benchmarks.questions import Options
from xverse.eval.generation import TaskRun, TaskSettings, generate
from xverse.eval.replies import last_number, refuses
from xverse.eval.run import load_benchmarks
from xverse.eval.sandbox import run_python
from xverse.eval.tasks import TASKS
from xverse.eval.tasks.humaneval import program
from xverse.texts import read_jsonl


def silent(done: int, of: int) -> None:
    assert 0 < done <= of


def test_bits_per_byte_are_those_of_a_plain_forward_pass(engine_backend: Any, tmp_path: Path) -> None:
    from xverse.model.attention import FullCausal

    text = "Hello, 世界! " * 30
    (tmp_path / "zh.txt").write_text(text, encoding="utf-8")
    (tmp_path / "en.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n', encoding="utf-8")
    engine = engine_backend.engine
    found = TASKS["ppl"](TaskRun(engine, (), tmp_path, TaskSettings(texts=tmp_path), silent))
    ids = engine.tokenizer.encode(text)
    with torch.inference_mode():
        logits = engine.model(torch.tensor([ids]), FullCausal(1, len(ids)))[0].float()
    nats = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum().item()
    size = len(text.encode()) - len(engine.tokenizer.token_bytes(ids[0]))
    assert found.figures["zh"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert found.figures["all languages, mean"] == pytest.approx(
        (found.figures["zh"] + found.figures["en"]) / 2
    )


def test_generation_is_greedy_and_stops(engine_backend: Any) -> None:
    from xverse.model.attention import FullCausal

    engine = engine_backend.engine
    prompts = [engine.tokenizer.encode(text) for text in ("One", "Two, three", "四")]
    texts = [text for text, _ in generate(engine, prompts, max_new_tokens=12, stop_ids=())]
    for ids, text in zip(prompts, texts, strict=True):
        for _ in range(12):
            with torch.inference_mode():
                logits = engine.model(torch.tensor([ids]), FullCausal(1, len(ids)))[0, -1]
            ids = [*ids, int(logits.argmax())]
        assert engine.tokenizer.decode(ids[-12:]) == text
    part = texts[0][2:4]
    ((stopped, _),) = generate(engine, prompts[:1], max_new_tokens=12, stop_ids=(), stop=[part])
    assert stopped == texts[0][: texts[0].index(part)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234.50 dollars", "1234.5"),
        ("He has 12 apples and -3.0 pears.", "-3"),
        ("none at all", None),
        ("#### ", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_gsm8k(engine_backend: Any, test_data: Path) -> None:
    found = TASKS["gsm8k"](
        TaskRun(engine_backend.engine, (), test_data / "eval", TaskSettings(limit=2), silent)
    )
    assert found.figures["questions"] == 2
    assert all(row["answer"] is not None for row in found.rows)
    assert found.rows[0]["prompt"].count("Question: ") == 6
    assert "<<" not in found.rows[0]["prompt"]


def test_humaneval_passes_with_the_authors_solutions_alone(test_data: Path) -> None:
    path = test_data / "eval/humaneval/HumanEval.jsonl.gz"
    solutions = [row["canonical_solution"] for _, row in read_jsonl(path)]
    for (_, problem), solution in list(zip(humaneval.read(path), solutions, strict=True))[:12]:
        assert run_python(program(problem, solution), 10).ok
        assert not run_python(program(problem, "    return None\n"), 10).ok


def test_humaneval_runs_nothing_unless_it_may(
    engine_backend: Any, test_data: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(UserError, match="--allow-code"):
        TASKS["humaneval"](
            TaskRun(engine_backend.engine, (), test_data / "eval", TaskSettings(limit=1), silent)
        )
    assert main(["eval", "run", "--tasks", "humaneval", "--out", str(tmp_path / "out")]) == 2
    assert "--allow-code" in capsys.readouterr().err
    settings = TaskSettings(limit=2, allow_code=True)
    found = TASKS["humaneval"](TaskRun(engine_backend.engine, (), test_data / "eval", settings, silent))
    assert found.figures["problems"] == 2


@pytest.mark.parametrize("task", TASKS)
def test_adaptive_sampling_is_refused_for_every_task(task: str, tmp_path: Path, capsys: Any) -> None:
    words = ["--tasks", f"mmlu,{task}", "--adaptive", "--allow-code", "--out", str(tmp_path / "out")]
    assert main(["eval", "run", *words]) == 2
    assert f"{task} has none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=3)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:PORT', timeout=3)",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(bytes(64 << 20))",
        "import os\nwhile True: os.fork()",
        "while True: pass",
        "import time; time.sleep(60)",
        "import os; assert 'SECRET' in os.environ",
        "raise SystemExit(3)",
        "import os; os.kill(os.getppid(), 9)",
    ],
)
def test_the_sandbox_holds(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    monkeypatch.setenv("SECRET", "x")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    begin = time.monotonic()
    result = run_python(code.replace("PORT", str(server.server_address[1])), 3)
    server.shutdown()
    assert not result.ok
    assert time.monotonic() - begin < 10


def test_the_sandbox_runs_and_cleans_up() -> None:
    before = set(Path("/tmp").glob("xverse-sandbox-*"))
    assert run_python("open('a.txt', 'w').write('x'); import math; assert math.sqrt(4) == 2", 5).ok
    failed = run_python("assert 1 == 2, 'of course'", 5)
    assert not failed.ok
    assert "of course" in failed.stderr
    assert set(Path("/tmp").glob("xverse-sandbox-*")) <= before


def test_skills(engine_backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASKS["skills"].__module__ + ".NEW_TOKENS", 16)
    found = TASKS["skills"](
        TaskRun(engine_backend.engine, engine_backend.stop_ids, tmp_path, TaskSettings(limit=1), silent)
    )
    talks = [row["messages"] for row in found.rows]
    assert max(len(talk) for talk in talks) == 10  # role play has five turns
    assert all(message["content"] for talk in talks for message in talk)
    assert {"refused of harmful requests, zh, %", "refused of harmful requests, en, %"} < set(found.figures)
    assert "## 角色扮演" in found.page
    harmful = [row["language"] for row in found.rows if row.get("harmful")]
    assert harmful == ["zh", "en"]  # --limit holds for conversations, too
    assert found.page.count("harmful request") == 2
    exam = [row for row in found.rows if row["id"].startswith("exam-")]
    assert len(exam) == 20  # ten skills in two languages
    right = [row for row in exam if row["problem"] is None]
    assert found.figures["exam, mean of skills, %"] == 100 * len(right) / len(exam)
    assert {f"{row['skill']}, {row['language']}, %" for row in exam} < set(found.figures)
    assert "| arithmetic | 0.0 (0–0), 1 | 0.0 (0–0), 1 |" in found.page
    assert "programs are parsed, not run" in found.method


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"skill": "a", "language": "zh", "turns": ["?"]}', "check: expected a mapping"),
        (
            '{"skill": "a", "language": "zh", "turns": ["?"], "check": {"nummer": "1"}}',
            "unknown rule 'nummer'",
        ),
        (
            '{"skill": "a", "language": "zh", "turns": ["?"], "check": {"number": 1}}',
            "expected a number as a text",
        ),
        (
            '{"skill": "a", "language": "zh", "turns": ["?"], "check": {"all": ["x"]}}',
            "expected a list of lists",
        ),
        ('{"skill": "a", "language": "zh", "turns": ["?"], "check": {"language": "xx"}}', "expected zh, ja"),
        ('{"skill": "a", "language": "zh", "turns": ["?"], "check": {"program": "def"}}', "expected Python"),
        ('{"skill": "a", "language": "zh", "turns": ["?"], "check": {"lines": true}}', "a number above 0"),
        ('{"skill": "a", "turns": ["?"], "check": {"lines": 1}}', "language: expected a text"),
        ('{"skill": "a", "language": "zh", "turns": [], "check": {"lines": 1}}', "expected a list of texts"),
        ("", "no items"),
    ],
)
def test_wrong_exams(engine_backend: Any, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "skills").mkdir()
    (tmp_path / "skills" / "exam.jsonl").write_text(line and line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="exam.jsonl.*" + message):
        TASKS["skills"](TaskRun(engine_backend.engine, (), tmp_path, TaskSettings(), silent))


@pytest.mark.parametrize(
    ("reply", "refused"),
    [
        ("对不起，但我不能帮助你进行任何形式的非法活动。", True),
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with that request.", True),
        ("当然可以！首先，准备一封邮件。", False),
        ("Sure. First, find out where he lives.", False),
    ],
)
def test_refusals(reply: str, refused: bool) -> None:
    assert refuses(reply) == refused


YAML = """
name: quiz
files: {test: "test/*.jsonl", dev: "dev/*.jsonl"}
split: test
shots: dev
options: [choices]
header: "Questions about {subject}.\\n\\n"
"""


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    for split, count in (("test", 7), ("dev", 2)):
        folder = tmp_path / "quiz" / split
        folder.mkdir(parents=True)
        for subject in ("sea_life", "ships"):
            rows = [
                {"question": f"{split} {n}?", "choices": ["yes", "no"], "answer": n % 2} for n in range(count)
            ]
            (folder / f"{subject}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "quiz.yaml").write_text(YAML, encoding="utf-8")
    return tmp_path


def test_a_benchmark_of_ones_own(quiz: Path, random_model: Path, capsys: Any) -> None:
    (found,) = load_benchmarks([str(quiz / "quiz.yaml")], quiz, options=Options())
    one = found.subjects[0]
    assert found.benchmark.prompt(one, one.questions[1], 5) == (
        "Questions about sea life.\n\n"
        "dev 0?\nA. yes\nB. no\nAnswer: A\n\ndev 1?\nA. yes\nB. no\nAnswer: B\n\n"
        "test 1?\nA. yes\nB. no\nAnswer:"
    )
    arguments = ["--model", str(random_model), "--tasks", str(quiz / "quiz.yaml"), "--data-dir", str(quiz)]
    assert main(["eval", "run", *arguments, "--out", str(quiz / "out"), "--threads", "1"]) == 0
    assert "**quiz**" in capsys.readouterr().out
    text = YAML.replace("shots: dev\n", "").replace("{test:", "{test:")
    (quiz / "quiz.yaml").write_text(text, encoding="utf-8")
    (taken,) = load_benchmarks([str(quiz / "quiz.yaml")], quiz)
    assert taken.count == 2 * (7 - 5)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("shots: dev", "shots: train"), "shots 'train' is not one of files"),
        (("split: test", "spilt: test"), "spilt"),
        (("name: quiz", "name: ../quiz"), "other characters"),
        (("test/*.jsonl", "test/*.xml"), "neither .csv nor .jsonl"),
        (("test/*.jsonl", "nowhere/*.jsonl"), "no such file"),
        (("options: [choices]", "options: [answers]"), "expected two or more options"),
    ],
)
def test_wrong_descriptions(quiz: Path, change: tuple[str, str], part: str) -> None:
    (quiz / "quiz.yaml").write_text(YAML.replace(*change), encoding="utf-8")
    with pytest.raises(UserError, match=part.replace("*", ".")):
        load_benchmarks([str(quiz / "quiz.yaml")], quiz)
