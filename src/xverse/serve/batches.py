"""The batches of ``/v1/batches``, one after the other, through the routes that other requests use.

A batch's state is a file that is replaced atomically; its answers are appended as ``batch_file.py`` does it.
After a crash the next server continues where they end, and what it writes twice has the same name.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from xverse.config import UserError
from xverse.files import alone, write_json
from xverse.log import notice
from xverse.serve.batch_file import Answer, Answers, BatchRequest, answer_all, answers, read_requests
from xverse.serve.file_store import FileStore, StoredFile

MOST_BATCHES, MOST_OPEN, MOST_REQUESTS = 1000, 100, 50_000
SECONDS = 24 * 3600  # a batch expires after OpenAI's completion window
_ENDED = ("failed", "completed", "expired", "cancelled")
_ID = re.compile(r"batch_[0-9a-f]{24}")
_RETRY = 1.0  # seconds until a request is sent again that the queue had no room for
Batch = dict[str, Any]  # OpenAI's object, and ``owner``: the fingerprint of the key that may use it
Call = Callable[[str, dict[str, Any], str | None], Awaitable[Answer]]  # with the owner


class Batches:
    """The batches in ``folder``, to endpoints in ``urls``; ``running`` works them off."""

    def __init__(self, folder: Path, urls: Collection[str]) -> None:
        self.urls = urls
        self._folder = folder / "batches"
        self._lock = contextlib.ExitStack()
        text = f"--batch-folder: {folder} is in use by another server"
        self._lock.enter_context(alone(folder / ".lock", text))
        self.files = FileStore(folder / "files")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._batches: dict[str, Batch] = {}
        for path in self._folder.glob(".*.tmp"):  # what a crash left
            path.unlink()
        for path in sorted(self._folder.glob("batch_*.json")):
            try:
                batch = json.loads(path.read_text(encoding="utf-8"))
                self._batches[batch["id"]] = batch
            except (ValueError, TypeError, KeyError, OSError):
                notice(f"serve: {path} is not the state of a batch; ignored")
        self._work: asyncio.Task[None] | None = None  # on the batch that runs
        self._running: str | None = None
        self._draining: Callable[[], bool] = lambda: False
        self._more = asyncio.Event()

    # ---- what the routes do ----

    def create(
        self, file: StoredFile, endpoint: str, metadata: dict[str, str] | None, owner: str | None
    ) -> Batch:
        """Raises UserError if too many batches wait."""
        if sum(batch["status"] not in _ENDED for batch in self._batches.values()) >= MOST_OPEN:
            raise UserError(f"input_file_id: {MOST_OPEN} batches wait or run, the most at once")
        ended = [batch for batch in self._batches.values() if batch["status"] in _ENDED]
        for batch in sorted(ended, key=lambda batch: batch["created_at"])[
            : len(self._batches) + 1 - MOST_BATCHES
        ]:
            del self._batches[batch["id"]]
            self._path(batch).unlink(missing_ok=True)
            self._answers(batch).unlink(missing_ok=True)  # of one that failed
        now = int(time.time())
        times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        batch = {
            "id": f"batch_{uuid.uuid4().hex[:24]}",
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": file.id,
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + SECONDS,
            **{f"{name}_at": None for name in times},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            "owner": owner,
        }
        self._save(batch)
        self._batches[batch["id"]] = batch
        self._more.set()
        return batch

    def get(self, name: str, owner: str | None) -> Batch | None:
        found = self._batches.get(name) if _ID.fullmatch(name) else None
        return found if found is not None and found["owner"] == owner else None

    def owned(self, owner: str | None) -> list[Batch]:
        """The owner's batches, newest first."""
        mine = [batch for batch in self._batches.values() if batch["owner"] == owner]
        return sorted(mine, key=lambda batch: (-batch["created_at"], batch["id"]))

    def uses(self, file: StoredFile) -> bool:
        """Whether a batch that has not ended reads the file."""
        open_batches = (batch for batch in self._batches.values() if batch["status"] not in _ENDED)
        return any(batch["input_file_id"] == file.id for batch in open_batches)

    def cancel(self, batch: Batch) -> None:
        """End a batch; the answers so far are kept. Raises UserError if it has ended."""
        if batch["status"] in (*_ENDED, "finalizing"):
            raise UserError(f"the batch is {batch['status']} and cannot be cancelled")
        if batch["status"] == "cancelling":
            return
        self._enter(batch, "cancelling")
        if self._running == batch["id"] and self._work is not None:
            self._work.cancel()
        self._more.set()

    # ---- working them off ----

    @contextlib.asynccontextmanager
    async def running(self, call: Call, at_once: int, draining: Callable[[], bool]) -> AsyncIterator[None]:
        """Work in the background. At the end, and while the server is ``draining``, requests in flight are
        given up; the next server sends them again."""
        self._draining = draining
        worker = asyncio.create_task(self._run(call, at_once))
        watcher = asyncio.create_task(self._watch(worker))
        try:
            yield
        finally:
            for task in (watcher, worker):
                task.cancel()
            await asyncio.gather(worker, watcher, return_exceptions=True)
            self._lock.close()

    async def _watch(self, worker: asyncio.Task[None]) -> None:
        while not self._draining():
            await asyncio.sleep(0.1)
        worker.cancel()

    async def _run(self, call: Call, at_once: int) -> None:
        while True:
            waiting = [batch for batch in self._batches.values() if batch["status"] not in _ENDED]
            if not waiting:
                self._more.clear()
                await self._more.wait()
                continue
            batch = min(waiting, key=lambda batch: (batch["created_at"], batch["id"]))
            try:
                await self._process(batch, call, at_once)
            except Exception as error:  # such as a full disk; the other batches continue
                text = " ".join(str(error).split())[:300] or type(error).__name__
                notice(f"serve: {batch['id']}: {text}")
                with contextlib.suppress(UserError, OSError):  # it has failed for this server anyway
                    self._fail(batch, [_error(text.replace(f"{self._folder}/", ""), None)])

    async def _process(self, batch: Batch, call: Call, at_once: int) -> None:
        file = self.files.get(batch["input_file_id"], batch["owner"])
        try:
            if file is None:
                raise UserError("the input file does not exist any more")
            requests = await asyncio.to_thread(self._read, batch, file)
        except UserError as error:
            line = re.search(r", line (\d+)", str(error))
            self._fail(batch, [_error(str(error), int(line[1]) if line else None)])
            return
        batch["request_counts"]["total"] = len(requests)
        if batch["status"] == "validating":
            self._enter(batch, "in_progress")
        with answers(self._answers(batch), requests) as answered:
            self._count(batch, answered)
            if batch["status"] == "in_progress":
                await self._answer(batch, requests, answered, call, at_once)
        ending = {"cancelling": "cancelled", "expired": "expired"}.get(batch["status"], "completed")
        if ending == "completed":
            self._enter(batch, "finalizing")
        await asyncio.shield(asyncio.to_thread(self._finish, batch, requests, ending))

    async def _answer(
        self, batch: Batch, requests: list[BatchRequest], answered: Answers, call: Call, at_once: int
    ) -> None:
        async def patiently(url: str, body: dict[str, Any]) -> Answer:
            while (answer := await call(url, body, batch["owner"]))[0] == 429:
                await asyncio.sleep(_RETRY)
            if answer[0] == 503 and self._draining():
                await asyncio.Event().wait()  # for the end of this server
            return answer

        count = lambda done: self._count(batch, answered)  # noqa: E731
        self._running = batch["id"]
        self._work = asyncio.ensure_future(answer_all(requests, answered, patiently, at_once, count))
        try:
            left = batch["expires_at"] - time.time()
            await asyncio.wait_for(asyncio.shield(self._work), max(left, 0))
        except TimeoutError:
            self._enter(batch, "expired", final=False)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if batch["status"] != "cancelling" or (task is not None and task.cancelling()):
                raise  # the worker itself was cancelled
        finally:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
            self._work = self._running = None

    def _read(self, batch: Batch, file: StoredFile) -> list[BatchRequest]:
        """The requests of the input. Raises UserError, which names the line, if it is wrong."""
        path = self.files.path(file)
        try:
            requests = read_requests(path, self.urls)
            if len(requests) > MOST_REQUESTS:
                raise UserError(f"{len(requests)} requests are too many; the limit is {MOST_REQUESTS}")
            for number, request in enumerate(requests, 1):
                if request.url != batch["endpoint"]:
                    text = f"{path}, line {number}: url {request.url!r} is not the batch's endpoint"
                    raise UserError(f"{text}, {batch['endpoint']!r}")
        except UserError as error:
            raise UserError(str(error).replace(str(path), file.filename)) from None
        return requests

    def _finish(self, batch: Batch, requests: list[BatchRequest], ending: str) -> None:
        """Divide the answers into the two files. Their names follow from the batch's, so that this may be
        done again after a crash."""
        source = self._answers(batch)
        made: dict[str, str | None] = {"output": None, "error": None}
        missing = []
        if ending == "expired":
            given = {json.loads(line)["custom_id"] for line in source.open(encoding="utf-8")}
            missing = [request for request in requests if request.custom_id not in given]

        def write(to: BinaryIO, kind: str) -> None:
            with source.open("rb") as lines:
                for line in lines:
                    if (json.loads(line)["response"]["status_code"] == 200) == (kind == "output"):
                        to.write(line)
            error = {"code": "batch_expired", "message": "the batch expired before this request was answered"}
            for request in missing if kind == "error" else ():
                given_up = {
                    "id": request.id,
                    "custom_id": request.custom_id,
                    "response": None,
                    "error": error,
                }
                to.write(json.dumps(given_up, ensure_ascii=False).encode(errors="replace") + b"\n")

        for kind in made:
            name = "file-" + hashlib.sha256(f"{batch['id']} {kind}".encode()).hexdigest()[:24]
            filename = f"{batch['id']}_{kind}.jsonl"
            writer = functools.partial(write, kind=kind)
            file = self.files.add(writer, filename, "batch_output", batch["owner"], name=name)
            if file.bytes:
                made[kind] = file.id
            else:
                self.files.delete(file)
        batch["output_file_id"], batch["error_file_id"] = made["output"], made["error"]
        self._enter(batch, ending)
        source.unlink(missing_ok=True)

    def _fail(self, batch: Batch, errors: list[dict[str, Any]]) -> None:
        batch["errors"] = {"object": "list", "data": errors}
        self._enter(batch, "failed")

    @staticmethod
    def _count(batch: Batch, answered: Answers) -> None:
        counts = batch["request_counts"]
        counts["failed"], counts["completed"] = answered.failed, len(answered.given) - answered.failed

    def _enter(self, batch: Batch, status: str, final: bool = True) -> None:
        batch["status"], batch[f"{status}_at"] = status, int(time.time())
        if final:
            self._save(batch)

    def _path(self, batch: Batch) -> Path:
        return self._folder / f"{batch['id']}.json"

    def _answers(self, batch: Batch) -> Path:
        """Where they are until they are divided."""
        return self._folder / f"{batch['id']}.answers"

    def _save(self, batch: Batch) -> None:
        write_json(self._path(batch), batch)


def _error(message: str, line: int | None) -> dict[str, Any]:
    return {"code": "invalid_request", "message": message, "line": line, "param": None}
