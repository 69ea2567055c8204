"""``xverse batch``: every request is answered once, whatever ends the process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver
from xverse.config import UserError
from xverse.serve.batch_file import answer_all, answers, read_requests
from xverse.serve.caller import URLS

# A process that answers slowly, and of whose lines many are long: kills hit it while it writes.
PROGRAM = """
import asyncio, sys
from xverse.serve.batch_file import answer_all, answers, read_requests

async def call(url, body):
    await asyncio.sleep(0.002)
    return 200, "r", {"said": body["prompt"] * 20000}

requests = read_requests(sys.argv[1], ["/v1/completions"])
with answers(sys.argv[2], requests) as found:
    print("begun", flush=True)
    asyncio.run(answer_all(requests, found, call, 8))
"""


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def request(number: int, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body or {"prompt": str(number)}}


def test_no_answer_is_lost_or_doubled_by_kill_9(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [request(number) for number in range(500)]), tmp_path / "out"
    command = [sys.executable, "-c", PROGRAM, str(source), str(out)]
    for kills_left in (3, 2, 1, 0):
        process = forkserver.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        if kills_left:
            before = out.stat().st_size
            while out.stat().st_size < before + 300_000:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.wait() == (-signal.SIGKILL if kills_left else 0)
        if kills_left == 1:  # as a crash of the machine would leave it
            os.truncate(out, out.stat().st_size - 100)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{number}" for number in range(500))
    for line in lines:
        assert line["response"]["body"]["said"] == line["custom_id"][1:] * 20000


def test_a_batch_is_answered_as_by_the_server(server: Any, new_service: Any, tmp_path: Path) -> None:
    from xverse.serve.app import InProcess

    question = [{"role": "user", "content": "What is your name?"}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": question, "temperature": 0, "max_tokens": 8}),
        ("/v1/completions", {"prompt": "The", "temperature": 0, "max_tokens": 8}),
        ("/v1/embeddings", {"input": "one"}),
        ("/v1/messages", {"model": "nano", "messages": question, "max_tokens": 0}),
        ("/v1/chat/completions", {"messages": question, "model": "other"}),
    ]
    lines = [request(number, url, **body) for number, (url, body) in enumerate(bodies)]
    requests = read_requests(write(tmp_path / "in.jsonl", lines), URLS)
    app = InProcess(new_service())

    async def run(found: Any) -> None:
        async with app.running():
            await answer_all(requests, found, app.call, 4)

    with answers(tmp_path / "out.jsonl", requests) as found:
        asyncio.run(run(found))
        assert found.failed == 2
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    said = {line["custom_id"]: line["response"] for line in written}
    with server.client() as http:
        for number, (url, body) in enumerate(bodies):
            expected, got = http.post(url, json=body), said[f"r{number}"]
            assert got["status_code"] == expected.status_code
            assert got["request_id"]
            for name in ("choices", "data", "usage"):
                assert got["body"].get(name) == expected.json().get(name) or url == "/v1/embeddings"
    assert said["r3"]["body"]["error"]["message"] == "max_tokens: must be at least 1"
    assert said["r4"]["status_code"] == 404


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ([], "must be an object"),
        ({"url": "/v1/completions", "body": {}}, "custom_id must be"),
        (request(1), "custom_id 'r1' is that of line 1 too"),
        ({**request(2), "method": "GET"}, "method must be 'POST'"),
        (request(2, "/v1/completion"), "did you mean '/v1/completions'?"),
        ({**request(2), "body": "x"}, "body must be an object"),
        (request(2, prompt="x", stream=True), "not streamed"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, text: str) -> None:
    with pytest.raises(UserError, match=r"in\.jsonl, line 2: ") as failed:
        read_requests(write(tmp_path / "in.jsonl", [request(1), line]), URLS)
    assert text in str(failed.value)


def test_answers_of_another_batch_are_kept(tmp_path: Path) -> None:
    requests = read_requests(write(tmp_path / "in.jsonl", [request(1)]), URLS)
    out = tmp_path / "out.jsonl"
    with answers(out, requests) as found:
        found.add(requests[0], (200, "r", {}))
        with pytest.raises(UserError, match="another process"), answers(out, requests):
            pass
    before = out.read_bytes()
    changed = read_requests(write(tmp_path / "in.jsonl", [request(1, prompt="y")]), URLS)
    with pytest.raises(UserError, match="belongs to another request"), answers(out, changed):
        pass
    assert out.read_bytes() == before
    write(out, ["text"])
    with pytest.raises(UserError, match="not one of a batch"), answers(out, requests):
        pass
    for text in ('{"mine": 1}', "[" * 9000, "notes"):  # without a line's end, as what a crash left
        out.write_text(text)
        with pytest.raises(UserError, match="is not a file of answers"), answers(out, requests):
            pass
        assert out.read_text() == text
    out.write_text("[" * 9000 + "\n")
    with pytest.raises(UserError, match="not one of a batch"), answers(out, requests):
        pass


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    from xverse.cli import main

    source = write(tmp_path / "in.jsonl", [request(1)])
    out = tmp_path / "out.jsonl"
    requests = read_requests(source, URLS)
    with answers(out, requests) as found:
        found.add(requests[0], (200, "r", {}))
    assert main(["batch", str(source), "--out", str(out)]) == 0  # loads no model
    assert capsys.readouterr().out == f"1 requests answered in {out}\n"
    assert main(["batch", str(tmp_path / "none"), "--out", str(out)]) == 2
