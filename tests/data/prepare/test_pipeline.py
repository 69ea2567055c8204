"""``xverse data prepare`` with all stages: kills, clusters, full disks, bad text."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forkserver
from tests.scale import ALL
from xverse.cli import main
from xverse.config import UserError, load
from xverse.data.prepare.pipeline import PrepareRecipe, prepare
from xverse.data.shards import Shard
from xverse.tokenizer import Tokenizer

SENTENCES = {
    "en": "The {0} of the town was {1} and the people who lived there said that it had always been {2}.",
    "de": "Die {0} der Stadt war {1} und die Leute, die dort wohnten, sagten, dass sie immer {2} war.",
    "fr": "La {0} de la ville était {1} et les gens qui y vivaient disaient qu'elle avait toujours été {2}.",
}
WORDS = [
    f"{a}{b}"
    for a in ("bel", "mar", "tor", "sil", "gran", "pol")
    for b in ("a", "ento", "ino", "us", "eth", "or")
]
QUESTION = (
    "Which of the seven bridges of the old town was closed for repairs during the winter of the great flood?"
)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A recipe with every stage, its text in four files, its tokenizer and its benchmark."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for number in range(4):
        rows = []
        for _ in range(30):
            language = rng.choice(sorted(SENTENCES))
            lines = [SENTENCES[language].format(*rng.choices(WORDS, k=3)) for _ in range(6)]
            rows.append({"text": " ".join(lines), "lang": language, "source": f"s{number % 2}"})
        rows.append({"text": "too short", "lang": "en"})
        rows.append({"text": rows[0]["text"] + " Once more.", "lang": rows[0]["lang"], "source": "copy"})
        rows.append(
            {"text": rows[1]["text"].replace(".", ". " + QUESTION, 1), "lang": "en", "source": "exam"}
        )
        rows.append({**rows[2], "text": rows[2]["text"] + " Write to jane@example.org."})
        lines = [json.dumps(row) for row in rows]
        lines.insert(3, "{broken")
        (folder / f"part{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "eval" / "gsm8k").mkdir(parents=True)
    (folder / "eval" / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    tiny_tokenizer.save(folder / "tokenizer")
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
inputs: [{{path: "{folder}/part*.jsonl", category: web}}]
out: {folder / "unused"}
tokenizer: {folder / "tokenizer"}
valid_share: 0.1
stages:
  normalise: true
  language: {{languages: [en, de, fr], mismatch: relabel}}
  quality: {{all: {{max_top_ngrams: null, max_repeated_ngrams: null}}}}
  pii: true
  near_duplicates: {{}}
  decontaminate: {{data_dir: {folder / "eval"}}}
"""
    )
    return path


@pytest.fixture(scope="module")
def prepared(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the recipe, without being disturbed."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert prepare(load(PrepareRecipe, recipe_file, [f"out={out}", "executor.workers=1"])) is not None
    return out


def test_every_stage_does_its_part(prepared: Path) -> None:
    report = json.loads((prepared / "report.json").read_text())
    assert set(report["dropped"]) == {"quality", "decontaminate", "duplicates"}
    assert report["dropped"]["quality"] == 4
    assert report["dropped"]["decontaminate"] == 4
    assert 6 <= report["near_duplicates"] <= 8  # a copy of each file, and what became one without its address
    assert report["questions"] == {"gsm8k": 1}
    assert report["scrubbed"] == {"<email>": 4}
    assert [row["name"] for row in report["sources"]] == ["web_de", "web_en", "web_fr"]
    text = (prepared / "report.md").read_text()
    for heading in ("By language", "By source", "Decontamination", "Examples of dropped documents"):
        assert f"## {heading}" in text
    assert "| quality: min_words | 4 |" in text
    assert (prepared / "report.png").read_bytes().startswith(b"\x89PNG")
    bad = (prepared / "skipped.txt").read_text().splitlines()
    assert len(bad) == 4
    assert bad[0].endswith("part0.jsonl, line 4: invalid JSON")
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    for name in ("web_de", "web_en", "web_fr"):
        shard = Shard.open(prepared / "train" / name)
        assert (shard.header.category, shard.header.language) == ("web", name[-2:])
        texts = [tokenizer.decode(shard.document(i).tolist()) for i in range(len(shard))]
        assert not any(QUESTION in text or "jane@" in text for text in texts)
    assert not (prepared / "work").exists()


def run_command(recipe_file: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "xverse.cli", "data", "prepare", str(recipe_file), f"out={out}", *more]


def test_killed_at_random_and_run_again_gives_the_same_bytes(
    recipe_file: Path, prepared: Path, tmp_path: Path
) -> None:
    """Two workers and their parent, killed by SIGKILL at random times, end where one process did."""
    out, rng = tmp_path / "out", random.Random(3)
    command = run_command(recipe_file, out, "executor.workers=2", "executor.tasks=4")
    killed = 0
    for _ in range(3 if ALL else 2):
        process = forkserver.Popen(
            command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        until = time.monotonic() + 240
        # From when the first files are there, so that the kills fall into the work and not before it.
        while not (out / "recipe.json").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 2.5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate()
    assert killed >= 1
    finished = forkserver.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert tree(out) == tree(prepared)


def test_workers_end_with_a_killed_parent(recipe_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys, os, time\n"
        "from pathlib import Path\n"
        "from xverse.data.prepare.executor import ExecutorConfig, Phase, run_phases\n"
        "from tests_sleeper import Sleeper\n"
        "run_phases([Phase('sleep', Sleeper(), 2)], ExecutorConfig(workers=2), Path(sys.argv[1]))\n"
    )
    (tmp_path / "tests_sleeper.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        "class Sleeper:\n"
        "    def __call__(self, data, rank, tasks):\n"
        "        Path(__file__).with_name(f'{rank}.pid').write_text(str(os.getpid()))\n"
        "        time.sleep(120)\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = forkserver.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    pids = [tmp_path / f"{rank}.pid" for rank in range(2)]
    wait_until(lambda: all(pid.exists() and pid.read_text() for pid in pids))
    process.kill()
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid.read_text()}").exists() for pid in pids))


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


class Die:
    """A task whose process is killed, as by a kernel that is out of memory."""

    def __call__(self, data: object, rank: int, tasks: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_clear_line(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_pipeline import Die\nfrom xverse.config import UserError\n"
        "from xverse.data.prepare.executor import ExecutorConfig, Phase, run_phases\n"
        "try:\n    run_phases([Phase('dying', Die(), 2)], ExecutorConfig(workers=2), Path(sys.argv[1]))\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = forkserver.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=400
    )
    assert done.stdout.startswith(
        "dying: a worker was killed, perhaps because memory ran out; run the command again"
    )


@pytest.mark.parametrize("small_disk", ["300k"], indirect=True)
def test_a_full_disk_is_one_line_and_can_be_gone_on_from(
    recipe_file: Path, prepared: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "prepare", str(recipe_file), f"out={small_disk / 'out'}", "executor.workers=1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "disk is full" in error or "No space left" in error
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert main(arguments) == 0
    assert tree(small_disk / "out") == tree(prepared)


def test_too_many_bad_lines_fail_the_run(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"4 of 140 lines cannot be read, more than max_bad_share 0\.01 allows"
    ):
        prepare(
            load(
                PrepareRecipe,
                recipe_file,
                [f"out={tmp_path}/out", "max_bad_share=0.01", "executor.workers=1"],
            )
        )
    # The threshold decides about no byte, so what was done counts.
    report = prepare(load(PrepareRecipe, recipe_file, [f"out={tmp_path}/out", "executor.workers=1"]))
    assert report is not None


def test_stages_that_leave_nothing(recipe_file: Path, tmp_path: Path) -> None:
    changes = [f"out={tmp_path}/out", "executor.workers=1", "stages.language={languages: [zh]}"]
    with pytest.raises(UserError, match="the stages drop every document"):
        prepare(load(PrepareRecipe, recipe_file, changes))


def test_a_language_without_a_document_is_named(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"out={tmp_path}/out", "executor.workers=1"]
    changes.append("stages.language={languages: [en, de, fr, ta], mismatch: relabel}")
    prepare(load(PrepareRecipe, recipe_file, changes))
    assert "ta: no document left in this language" in capsys.readouterr().err


def test_another_recipe_is_refused(recipe_file: Path, prepared: Path) -> None:
    with pytest.raises(UserError, match=r"made by another recipe \(differs in stages\)"):
        prepare(load(PrepareRecipe, recipe_file, [f"out={prepared}", "stages.pii=false"]))


def test_text_that_does_not_say_its_language(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"inputs: [{{path: {tmp_path}/a.txt}}]\nout: {tmp_path}/out\n")
    with pytest.raises(UserError, match="a text without a language; give the input a lang"):
        prepare(load(PrepareRecipe, recipe))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.normalize=true", "unknown key 'stages.normalize'; did you mean 'normalise'"),
        ("stages.quality.languages.en={min_wrds: 3}", "unknown rule 'min_wrds'"),
        ("corpus=here", "give either corpus or inputs"),
        ("executor.workers=0", "workers and tasks must be at least 1"),
        ("stages.decontaminate={data_dir: nowhere}", "contains none of the benchmarks"),
        ("executor={kind: slurm, options: {partition: cpu}}", "slurm needs 'time'"),
        (
            "executor={kind: slurm, options: {partitoin: cpu}}",
            "slurm has no 'partitoin'; did you mean 'partition'",
        ),
    ],
)
def test_mistakes_are_one_line(
    recipe_file: Path, tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", str(recipe_file), f"out={tmp_path}/out", change]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


SBATCH = """#!/usr/bin/env python3
# Runs what sbatch would queue: every task of the array, one after the other.
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
count = int(re.search(r"--array=0-(\\d+)", script)[1])
folder = os.path.dirname(os.path.abspath(__file__))
number = len(os.listdir(folder + "/jobs"))
open(f"{folder}/jobs/{number}", "w").write(" ".join(sys.argv[1:-1]))
if "merge_stats" not in script:
    for task in range(count + 1):
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": "0", "SLURM_NODELIST": "here"}
        subprocess.run(["bash", sys.argv[-1]], env=os.environ | slurm, stdout=subprocess.DEVNULL, check=False)
print("Submitted batch job", number)
"""


@pytest.mark.thorough
def test_the_same_recipe_on_slurm(recipe_file: Path, prepared: Path, tmp_path: Path) -> None:
    """Datatrove's Slurm executor, with an sbatch that runs its scripts at once."""
    programs = tmp_path / "bin"
    (programs / "jobs").mkdir(parents=True)
    launch = Path(sys.executable).with_name("launch_pickled_pipeline")
    for name, text in {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
        "launch_pickled_pipeline": f'#!/bin/bash\nexec {launch} "$@"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    options = "executor={kind: slurm, tasks: 2, options: {partition: cpu, time: '1:00:00'}}"
    command = run_command(recipe_file, tmp_path / "out", options)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = forkserver.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert tree(tmp_path / "out") == tree(prepared)
    jobs = [path.read_text() for path in (programs / "jobs").iterdir()]
    waiting = sum("--dependency=afterok" in job for job in jobs)
    assert waiting == 10  # every phase but the first waits for another
