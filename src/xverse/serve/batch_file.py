"""The files of a batch in OpenAI's form: requests, one JSON object per line, and their answers.

An answer is one line, appended and synchronised before the next one counts as given. After a crash a line of
which only a part was written is removed, and the requests that have an answer are not sent again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, nearest
from xverse.files import alone
from xverse.texts import read_jsonl

Answer = tuple[int, str, Any]  # HTTP status, id of the request, and body
Call = Callable[[str, dict[str, Any]], Awaitable[Answer]]


@dataclass(frozen=True)
class BatchRequest:
    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def id(self) -> str:
        """Derived from the request, so that answers to another one are recognised."""
        text = json.dumps([self.custom_id, self.url, self.body], sort_keys=True)
        return "batch_req_" + hashlib.sha256(text.encode(errors="replace")).hexdigest()[:24]


def read_requests(path: str | Path, urls: Collection[str]) -> list[BatchRequest]:
    """The requests of a file. Raises UserError, naming the line, for the first one that is not a request to
    one of ``urls``, and for a ``custom_id`` that occurs twice."""
    requests: list[BatchRequest] = []
    lines: dict[str, int] = {}
    for number, line in read_jsonl(path):
        where = f"{path}, line {number}"
        if not isinstance(line, dict):
            raise UserError(f"{where}: must be an object with custom_id, method, url and body")
        name, url, body = line.get("custom_id"), line.get("url"), line.get("body")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: custom_id must be a text that names the request")
        if name in lines:
            raise UserError(f"{where}: custom_id {name!r} is that of line {lines[name]} too")
        if line.get("method", "POST") != "POST":
            raise UserError(f"{where}: method must be 'POST'")
        if not isinstance(url, str) or url not in urls:
            hint = nearest(url, urls) if isinstance(url, str) else ""
            raise UserError(f"{where}: url {url!r} is not an endpoint for batches{hint}")
        if not isinstance(body, dict):
            raise UserError(f"{where}: body must be an object")
        if body.get("stream"):
            raise UserError(f"{where}: body.stream: answers in a batch are not streamed")
        lines[name] = number
        requests.append(BatchRequest(name, url, body))
    if not requests:
        raise UserError(f"{path}: contains no requests")
    return requests


_BEGINNING = b'{"id": "batch_req_'  # of every answer


class Answers:
    """The file of answers. ``given`` are the ids of requests that have one."""

    def __init__(self, path: Path, requests: Sequence[BatchRequest]) -> None:
        self._file = path.open("a+b")
        self.given: set[str] = set()
        self.failed = 0  # answers whose status is not 200
        known = {request.id for request in requests}
        self._file.seek(0)
        complete = 0
        for line in self._file:
            if not line.endswith(b"\n"):  # of a run that ended while it wrote, if it begins as an answer
                if not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                    raise UserError(f"{path}: is not a file of answers; use another --out")
                break
            self._count(line, f"{path}: the answer at byte {complete}", known)
            complete += len(line)
        self._file.truncate(complete)

    def _count(self, line: bytes, where: str, known: Collection[str]) -> None:
        try:
            answer = json.loads(line)
            name, status = answer["id"], answer["response"]["status_code"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{where} is not one of a batch; use another --out") from None
        if name not in known or name in self.given:
            raise UserError(f"{where} belongs to another request; use another --out")
        self.given.add(name)
        self.failed += status != 200

    def add(self, request: BatchRequest, answer: Answer) -> None:
        """Write an answer. Raises UserError if that fails; a part of a line is removed by the next run."""
        status, request_id, body = answer
        line = {
            "id": request.id,
            "custom_id": request.custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        }
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written ({error.strerror or error})") from None
        self.given.add(request.id)
        self.failed += status != 200

    def close(self) -> None:
        self._file.close()


@contextmanager
def answers(path: str | Path, requests: Sequence[BatchRequest]) -> Iterator[Answers]:
    """The file ``path``, which this process alone writes. Raises UserError for a file that cannot be written
    or has other contents."""
    path = Path(path)
    if not path.name or path.is_dir():
        raise UserError(f"--out: {str(path)!r} is not the name of a file")
    with alone(path.with_name(f".{path.name}.lock"), f"{path}: another process writes to it"):
        try:
            answered = Answers(path, requests)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            yield answered
        finally:
            answered.close()


async def answer_all(
    requests: Sequence[BatchRequest],
    answered: Answers,
    call: Call,
    at_once: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Answer the requests that have no answer yet, ``at_once`` of them at a time."""
    left = iter([request for request in requests if request.id not in answered.given])

    async def work() -> None:
        for request in left:
            answered.add(request, await call(request.url, request.body))
            progress(len(answered.given))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
