"""An S3 server on loopback (moto) that fails or holds requests when a test asks for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fsspec
import pytest

BUCKET = "s3://bucket"


class ObjectStore:
    """``files`` is fsspec's file system of it. ``failures`` requests that ``matches`` (method, path) are
    answered with 503; those that ``holds`` wait until ``release`` is set, and ``held`` is set meanwhile."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.release, self.held = threading.Event(), threading.Event()
        self.reset()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Answer every request again."""
        self.release.set()
        self.failures, self.answered = 0, 0
        self.matches: Callable[[str, str], bool] = lambda method, path: True
        self.holds: Callable[[str, str], bool] = lambda method, path: False

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self.holds(method, path):
            self.held.set()
            self.release.wait(60)
        if self.failures and self.matches(method, path):
            self.failures -= 1
            self.answered += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        answer: Iterable[bytes] = self._app(environ, start)
        return answer

    @property
    def files(self) -> Any:
        files = fsspec.filesystem("s3")
        files.invalidate_cache()
        return files

    def names(self, folder: str) -> set[str]:
        """The files below a folder of the bucket, by relative name."""
        return {name.removeprefix(f"bucket/{folder}/") for name in self.files.find(f"bucket/{folder}")}

    def close(self) -> None:
        self._server.shutdown()


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A running store with an empty bucket; fsspec and programs that are started use it."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    running = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": running.address,
            "AWS_MAX_ATTEMPTS": "1",  # retries are the project's
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        if running.files.exists("bucket"):  # moto's stores of a process hold the same
            running.files.rm("bucket", recursive=True)
        running.files.mkdir("bucket")
        yield running
        fsspec.filesystem("s3").clear_instance_cache()
    running.close()
