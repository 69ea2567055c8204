"""The Dockerfile without Docker: its RUN steps in clean virtual environments, as on a new machine. The test
needs pip's index and runs if ``XVERSE_TEST_IMAGE`` is set (.ci/run sets it with ``XVERSE_TEST_ALL``)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# What changes the machine itself; the environment of the test has it already.
OF_THE_MACHINE = ("apt-get", "useradd")


@dataclass
class Stage:
    """One FROM: a virtual environment, and a folder as the image's root."""

    root: Path
    folder: str = "/"
    variables: dict[str, str] = field(default_factory=dict)

    def inside(self, text: str) -> str:
        """``text`` with the image's paths replaced by those of this stage."""
        return re.sub(r"(?<![\w./-])/(src|dist)\b", rf"{self.root}/\1", text)

    def run(self, command: str) -> None:
        subprocess.run(
            ["sh", "-ec", self.inside(command)],
            check=True,
            cwd=self.inside(self.folder),
            env=self.environment(),
            timeout=900,
        )

    def environment(self) -> dict[str, str]:
        path = f"{self.root}/venv/bin:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("XVERSE_")}
        return {**kept, **self.variables, "PATH": path, "VIRTUAL_ENV": f"{self.root}/venv"}


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.timeout(1500)
@pytest.mark.skipif(not os.environ.get("XVERSE_TEST_IMAGE"), reason="set XVERSE_TEST_IMAGE (needs an index)")
def test_its_steps_make_a_server(tmp_path: Path) -> None:
    stages: dict[str, Stage] = {}
    entry: list[str] = []
    for word, rest in instructions():
        if word == "FROM":
            name = rest.rpartition(" AS ")[2] if " AS " in rest else "last"
            stages[name] = stage = Stage(tmp_path / name)
            subprocess.run([sys.executable, "-m", "venv", stage.root / "venv"], check=True)
        elif word == "ARG":
            name, _, default = rest.partition("=")
            # As in `docker build --build-arg`; CI configures pip with another index.
            stage.variables[name] = os.environ.get(name, default)
        elif word == "WORKDIR":
            stage.folder = rest
            Path(stage.inside(rest)).mkdir(parents=True, exist_ok=True)
        elif word == "COPY" and rest.startswith("--from="):
            source, target = rest.split()[1:]
            other = stages[rest.split()[0].removeprefix("--from=")]
            shutil.copytree(other.inside(source), stage.inside(target))
        elif word == "COPY":
            assert rest == ". /src"
            tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
            for name in filter(None, tracked):
                target = stage.root / "src" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        elif word == "RUN":
            if rest.split()[0] not in OF_THE_MACHINE:
                stage.run(rest)
        elif word == "ENTRYPOINT":
            entry = json.loads(rest)
        else:
            assert word in ("USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"), word
    assert list(stage.root.glob("venv/lib/python3*/site-packages/xverse/kernels/*.so")), "no kernels"

    assert entry[-2:] == ["--host", "0.0.0.0"]
    program = shutil.which(entry[0], path=f"{stage.root}/venv/bin")
    assert program
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, *entry[1:-1], "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=stage.environment(), cwd="/")
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        health = dict(instructions())["HEALTHCHECK"].partition(" CMD ")[2]
        asked = [*json.loads(health), str(process.pid)]  # in a container the server is process 1
        end = time.monotonic() + 60
        while subprocess.run(asked, env=stage.environment(), capture_output=True).returncode:
            assert time.monotonic() < end, shlex.join(asked)
            time.sleep(0.5)
        body = {"messages": [{"role": "user", "content": "What is your name?"}], "temperature": 0}
        request = urllib.request.Request(
            url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with opener.open(request, timeout=240) as answer:
            assert "XVERSE-nano" in json.loads(answer.read())["choices"][0]["message"]["content"]
        with opener.open(url + "/", timeout=240) as answer:
            assert b"page/app.js" in answer.read()
    finally:
        process.terminate()
        assert process.wait(30) == 0
