"""``/v1/files`` and ``/v1/batches``: OpenAI's client passes them, and kill -9 loses and doubles nothing."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from xverse.config import UserError
from xverse.formats import save_hf
from xverse.model.transformer import XverseForCausalLM, init_weights
from xverse.serve import file_store
from xverse.serve.app import InProcess
from xverse.serve.batches import Batches
from xverse.serve.caller import URLS
from xverse.serve.start import ServiceSettings, load_service


def lines(count: int, url: str = "/v1/completions", **body: Any) -> bytes:
    requests = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": url,
            "body": {"prompt": f"{n}", "max_tokens": 1, **body},
        }
        for n in range(count)
    ]
    return "".join(json.dumps(each) + "\n" for each in requests).encode()


@pytest.fixture
def server(launch: Any, tmp_path: Path) -> Any:
    return launch(guard={"max_body": 20_000, "max_upload": 1_000_000}, batch_folder=tmp_path / "kept")


def until_ended(client: Any, batch: Any, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while batch.status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def test_openais_client_uploads_runs_lists_and_cancels(server: Any) -> None:
    client = server.openai()
    contents = lines(20) + lines(1, n=9000).replace(b'"r0"', b'"wrong"')
    file = client.files.create(file=("in.jsonl", contents), purpose="batch")
    assert (file.bytes, file.filename, file.purpose, file.status) == (
        len(contents),
        "in.jsonl",
        "batch",
        "processed",
    )
    assert client.files.content(file.id).read() == contents
    assert client.files.retrieve(file.id) == file
    metadata = {"of": "a test"}
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata=metadata
    )
    assert batch.status == "validating"
    batch = until_ended(client, batch)
    assert (batch.status, batch.metadata, batch.endpoint) == ("completed", metadata, "/v1/completions")
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (21, 20, 1)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"r{n}" for n in range(20))
    assert all(answer["response"]["body"]["choices"][0]["finish_reason"] for answer in answers)
    (error,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("wrong", 400)
    assert error["response"]["body"]["error"]["param"] == "n"

    listed = [each.id for each in client.files.list()]
    assert set(listed) == {file.id, batch.output_file_id, batch.error_file_id}
    assert [each.id for each in client.files.list(purpose="batch_output", limit=1)] != [file.id]
    assert [each.id for each in client.batches.list()] == [batch.id]

    # a batch that takes long is cancelled; what was answered is kept
    long = client.files.create(file=("l.jsonl", lines(50, max_tokens=400, ignore_eos=True)), purpose="batch")
    endless = client.batches.create(
        input_file_id=long.id, endpoint="/v1/completions", completion_window="24h"
    )
    while client.batches.retrieve(endless.id).status == "validating":
        time.sleep(0.02)
    with pytest.raises(openai.ConflictError, match="in use"):
        client.files.delete(long.id)
    assert client.batches.cancel(endless.id).status == "cancelling"
    assert until_ended(client, endless).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="is cancelled and cannot be cancelled"):
        client.batches.cancel(endless.id)
    assert [each.id for each in client.batches.list(limit=1)]  # pages follow one another
    assert client.files.delete(long.id).deleted


def test_a_wrong_file_fails_its_batch_and_names_the_line(server: Any) -> None:
    client = server.openai()

    def run(contents: bytes, endpoint: str = "/v1/completions") -> Any:
        file = client.files.create(file=("in.jsonl", contents), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
        return until_ended(client, batch)

    two = lines(2)
    for contents, line, text in (
        (two + b"{\n", 3, "in.jsonl"),
        (two + two, 3, "custom_id 'r0' is that of line 1 too"),
        (two.replace(b"POST", b"GET", 1), 1, "method must be 'POST'"),
        (two + lines(1, "/v1/models").replace(b"r0", b"r2"), 3, "is not an endpoint"),
        (b"", None, "contains no requests"),
        (b"\xff\xfe\xfa", None, ""),
    ):
        batch = run(contents)
        (error,) = batch.errors.data
        assert (batch.status, batch.output_file_id) == ("failed", None)
        if line:
            assert error.line == line
        assert text in error.message
    batch = run(two, "/v1/embeddings")
    assert "url '/v1/completions' is not the batch's endpoint" in batch.errors.data[0].message


def test_what_is_refused(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = server.openai()
    file = client.files.create(file=("in.jsonl", lines(1)), purpose="batch")
    valid = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    for change, error, param in (
        ({"input_file_id": "file-" + "0" * 24}, openai.BadRequestError, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, openai.BadRequestError, "input_file_id"),
        ({"endpoint": "/v1/models"}, openai.BadRequestError, "endpoint"),
        ({"completion_window": "1h"}, openai.BadRequestError, "completion_window"),
        ({"metadata": {str(n): "" for n in range(17)}}, openai.BadRequestError, "metadata"),
        ({"metadata": {"a": "x" * 513}}, openai.BadRequestError, "metadata.a"),
    ):
        with pytest.raises(error) as raised:
            client.batches.create(**{**valid, **change})
        assert raised.value.body["param"] == param
    for call, param in (
        (lambda: client.files.create(file=("x", b"{}"), purpose="fine-tune"), "purpose"),
        (lambda: client.files.retrieve("file-" + "1" * 24), "file_id"),
        (lambda: client.files.content("..%2f..%2fx"), "file_id"),
        (lambda: client.batches.retrieve("batch_" + "1" * 24), "batch_id"),
        (lambda: client.batches.list(after="batch_x"), "after"),
        (lambda: client.files.list(after="file-x"), "after"),
        (lambda: client.files.list(limit="x"), "limit"),
    ):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as raised:
            call()
        assert raised.value.body["param"] == param
    with pytest.raises(openai.APIStatusError) as raised:
        client.files.create(file=("big", b"x" * 1_100_000), purpose="batch")
    assert raised.value.status_code == 413
    monkeypatch.setattr(file_store, "MOST_FILES", 1)
    with pytest.raises(openai.BadRequestError, match="1 files are stored"):
        client.files.create(file=io.BytesIO(lines(1)), purpose="batch")
    monkeypatch.undo()
    monkeypatch.setattr(file_store, "MOST_TOTAL", 200)
    with pytest.raises(openai.BadRequestError, match="of 200 bytes are in use"):
        client.files.create(file=("x", lines(3)), purpose="batch")
    folder = server.service.batches._folder.parent
    settings = ServiceSettings(model="/nowhere", batch_folder=str(folder))
    with pytest.raises(UserError, match="in use by another server"):  # before the model is loaded
        load_service(settings)


def test_files_and_batches_belong_to_their_key(launch: Any, tmp_path: Path) -> None:
    server = launch(guard={"keys": ["one", "two"]}, batch_folder=tmp_path)
    mine, other = server.openai("one"), server.openai("two")
    file = mine.files.create(file=("in.jsonl", lines(1)), purpose="batch")
    batch = mine.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = until_ended(mine, batch)
    asked = lines(1, "/v1/responses", input="a").replace(b'"prompt": "0", "max_tokens": 1, ', b"")
    asked_file = mine.files.create(file=("in.jsonl", asked), purpose="batch")
    answered = mine.batches.create(
        input_file_id=asked_file.id, endpoint="/v1/responses", completion_window="24h"
    )
    answers = mine.files.content(until_ended(mine, answered).output_file_id).text
    response = json.loads(answers)["response"]["body"]["id"]  # kept, for the batch's key
    assert mine.responses.retrieve(response).id == response
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(response)
    for name in (file.id, batch.output_file_id):
        with pytest.raises(openai.NotFoundError):
            other.files.content(name)
    with pytest.raises(openai.NotFoundError):
        other.batches.retrieve(batch.id)
    assert not other.files.list().data
    assert not other.batches.list().data


def test_without_a_folder_they_are_off(launch: Any) -> None:
    client = launch().openai()
    with pytest.raises(openai.NotFoundError, match="--batch-folder"):
        client.files.list()


def test_files_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = file_store.FileStore(tmp_path)
    file = store.add(io.BytesIO(b"x"), "f", "batch", None, expires_at=int(time.time()) + 100)
    assert file_store.FileStore(tmp_path).get(file.id, None) == file
    (tmp_path / "file-0.data").write_bytes(b"without a description, after a crash")
    assert file_store.FileStore(tmp_path).owned(None) == [file]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".data"}
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 101)
    assert store.get(file.id, None) is None
    assert not [*tmp_path.glob(f"{file.id}*")]


def test_kill_9_loses_and_doubles_no_line(tiny_tokenizer: Any, wide_config: Any, tmp_path: Path) -> None:
    """A real engine in a forked process, killed three times while it answers 500 lines."""
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, tmp_path / "model", torch.float32)
    service = load_service(ServiceSettings(model=str(tmp_path / "model"), max_cache_tokens=2048, threads=1))
    folder, source = tmp_path / "kept", lines(499) + lines(1, echo="no").replace(b'"r0"', b'"wrong"')

    def serve() -> None:
        async def run() -> None:
            service.batches = Batches(folder, URLS)
            if not service.batches.owned(None):
                file = service.batches.files.add(io.BytesIO(source), "in", "batch", None)
                service.batches.create(file, "/v1/completions", None, None)
            async with InProcess(service).running():
                while service.batches.owned(None)[0]["status"] != "completed":
                    await asyncio.sleep(0.01)

        asyncio.run(run())

    for kills_left in (3, 2, 1, 0):
        child = os.fork()
        if not child:
            code = 1
            try:
                serve()
                code = 0
            finally:
                os._exit(code)
        if kills_left:
            size = lambda: sum(path.stat().st_size for path in folder.glob("batches/*.answers"))  # noqa: E731
            before, end = size(), time.monotonic() + 60
            while size() < before + 20_000:
                assert time.monotonic() < end
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == bool(kills_left)
        assert kills_left or os.WEXITSTATUS(status) == 0
    batches = Batches(folder, URLS)
    (batch,) = batches.owned(None)
    assert batch["request_counts"] == {"total": 500, "completed": 499, "failed": 1}
    given = Counter[str]()
    for name in (batch["output_file_id"], batch["error_file_id"]):
        file = batches.files.get(name, None)
        assert file is not None
        given.update(json.loads(line)["custom_id"] for line in batches.files.path(file).open())
    assert given == Counter([*(f"r{n}" for n in range(499)), "wrong"])
    assert not [*folder.glob("batches/*.answers")]
