"""A hub on 127.0.0.1 that serves one directory as Hugging Face and ModelScope do, and breaks on request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

COMMIT = "c0ffee" + "0" * 34
LFS = (".bin", ".safetensors", ".parquet", "tokenizer.json")


class LoopbackHub:
    """``files`` are the repository; ``log`` holds (method, file, Range header) of each file request."""

    def __init__(self, model: str, directory: Path, kind: str = "models") -> None:
        self.model, self.kind = model, kind
        self.files = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
        self.log: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}  # file → bytes after which its connection breaks, once
        self.stall: dict[str, int] = {}  # file → bytes after which it waits for `released`, once
        self.released = threading.Event()
        self.corrupt: set[str] = set()  # files sent with one byte changed
        self.endpoint = ""

    def fetched(self) -> list[str]:
        return [name for method, name, _ in self.log if method == "GET"]

    def listing(self) -> list[dict[str, object]]:
        items: list[dict[str, object]] = []
        for name, content in self.files.items():
            item: dict[str, object] = {"type": "file", "path": name, "rfilename": name, "size": len(content)}
            item["oid"] = item["blobId"] = git_sha1(content)
            if name.endswith(LFS):
                sha256 = hashlib.sha256(content).hexdigest()
                item["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 130}
            items.append(item)
        return items


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            api = f"/api/{hub.kind}/{hub.model}"
            if path in (api, f"{api}/revision/main"):
                info = {"id": hub.model, "modelId": hub.model, "sha": COMMIT, "siblings": hub.listing()}
                self._json({**info, "private": False, "tags": [], "downloads": 0, "likes": 0})
            elif path == f"{api}/tree/{COMMIT}":
                self._json(hub.listing())
            elif path.startswith(f"/api/v1/models/{hub.model}"):
                self._modelscope(path)
            else:
                self._file(path)

        def do_HEAD(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith(f"/api/v1/models/{hub.model}"):
                self._modelscope(path)
            else:
                self._file(path)

        def _modelscope(self, path: str) -> None:
            query = parse_qs(urlsplit(self.path).query)
            if path.endswith("/repo/files"):
                files = [
                    {"Path": name, "Name": name, "Type": "blob", "Size": len(content)}
                    | {"Sha256": hashlib.sha256(content).hexdigest()}
                    for name, content in hub.files.items()
                ]
                self._json({"Code": 200, "Success": True, "Data": {"Files": files}})
            elif path.endswith("/repo"):
                self._file(f"/{hub.model}/resolve/{COMMIT}/{query['FilePath'][0]}")
            else:
                self._json({"Code": 200, "Success": True, "Data": {"Revision": "master"}})

        def _json(self, values: object, status: int = 200, **headers: str) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def _file(self, path: str) -> None:
            folder = "" if hub.kind == "models" else f"/{hub.kind}"
            prefix = f"{folder}/{hub.model}/resolve/{COMMIT}/"
            name = path.removeprefix(prefix)
            if not path.startswith(prefix) or name not in hub.files:
                self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                return
            content = hub.files[name]
            wanted = self.headers.get("Range")
            hub.log.append((self.command, name, wanted))
            large = name.endswith(LFS)
            etag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag}"')
            if large:
                self.send_header("X-Linked-Etag", f'"{etag}"')
                self.send_header("X-Linked-Size", str(len(content)))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if self.command == "GET":
                self._send(name, content, start)

        def _send(self, name: str, content: bytes, start: int) -> None:
            if name in hub.corrupt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            end = hub.cut.pop(name, None)
            if end is not None:
                self.wfile.write(content[start:end])
                self.close_connection = True
                return
            pause = hub.stall.pop(name, None)
            if pause is not None:
                self.wfile.write(content[start:pause])
                self.wfile.flush()
                hub.released.wait(60)
                start = pause
            self.wfile.write(content[start:])

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed, on purpose
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
