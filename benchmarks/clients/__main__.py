"""``python -m benchmarks.clients [NAME …]``: run clients from PyPI and npm against ``xverse serve``.

For each client an environment is created in ``--dir`` (and kept for the next run), the program is installed,
and its script in ``programs/`` runs: a conversation of several turns, streaming, tools and structured output,
as far as the client has them. The table says what passed; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
NANO = Path(__file__).parents[2] / "src" / "xverse" / "assets" / "nano"


@dataclass(frozen=True)
class Client:
    """``packages`` are installed with pip, or with npm if the ``script`` is JavaScript. The script receives
    the server's address in XVERSE_URL; it is a Python file, or a shell script that runs a command line."""

    packages: tuple[str, ...]
    script: str

    @property
    def node(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS = {
    "openai-2": Client(("openai<3",), "openai_python.py"),
    "openai-3": Client(("openai>=3",), "openai_python.py"),
    "openai-node": Client(("openai", "zod"), "openai_node.mjs"),
    "ai-sdk": Client(("ai", "@ai-sdk/openai-compatible", "zod"), "ai_sdk.mjs"),
    "ai-sdk-openai": Client(("ai", "@ai-sdk/openai", "zod"), "ai_sdk.mjs"),
    "litellm": Client(("litellm",), "litellm_client.py"),
    "langgraph": Client(("langchain-openai", "langgraph"), "langgraph_client.py"),
    "instructor": Client(("instructor",), "instructor_client.py"),
    "openai-agents": Client(("openai-agents",), "openai_agents.py"),
    "pydantic-ai": Client(("pydantic-ai-slim[openai]",), "pydantic_ai_client.py"),
    "smolagents": Client(("smolagents[openai]",), "smolagents_client.py"),
    "llm": Client(("llm",), "llm_command.py"),
    "aider": Client(("aider-chat",), "aider_command.py"),
    "llama-benchy": Client(("llama-benchy",), "llama_benchy.py"),
    "guidellm": Client(("guidellm",), "guidellm_command.py"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the clients; returns 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"clients (default: all of {', '.join(CLIENTS)})"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("clients.tmp"), help="where environments are created"
    )
    parser.add_argument("--url", help="a running server, http://HOST:PORT/v1 (default: starts one)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a client's script")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - CLIENTS.keys():
        parser.error(f"unknown client {', '.join(sorted(unknown))}; known are {', '.join(CLIENTS)}")
    results: dict[str, dict[str, Any]] = {}
    with _server(args.url) as url:
        for name in args.names or CLIENTS:
            results[name] = _run(name, CLIENTS[name], args.dir.resolve() / name, url, args.timeout)
            print(_row(name, results[name]), file=sys.stderr, flush=True)
    print("| client | version | passed | failed |\n|---|---|---|---|")
    for name, result in results.items():
        print(_row(name, result))
    failed = [name for name, result in results.items() if result["failed"]]
    print(json.dumps({"benchmark": "clients", "results": results, "failed": failed}))
    return 1 if failed else 0


def _row(name: str, result: dict[str, Any]) -> str:
    failed = "; ".join(f"{case}: {text}" for case, text in result["failed"].items())
    return f"| {name} | {result['version']} | {', '.join(result['passed'])} | {failed} |"


def _run(name: str, client: Client, folder: Path, url: str, timeout: float) -> dict[str, Any]:
    failed = {"version": "", "passed": []}
    try:
        version = _install_node(client, folder) if client.node else _install(client, folder)
    except subprocess.CalledProcessError as error:
        return {**failed, "failed": {"installation": _end_of(error.stderr)}}
    if client.node:
        command = ["node", str(folder / client.script)]
    else:
        command = [str(folder / "bin" / "python"), str(PROGRAMS / client.script)]
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")},
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "XVERSE_URL": url,
        "XVERSE_TOKENIZER": str(NANO),
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {**failed, "version": version, "failed": {"script": f"took more than {timeout:g} s"}}
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {**failed, "version": version, "failed": {"script": _end_of(done.stderr)}}
    return {"version": version, **result}


def _install(client: Client, folder: Path) -> str:
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *client.packages,
    ]
    subprocess.run(install, check=True, capture_output=True, text=True)
    package = client.packages[0].partition("<")[0].partition(">")[0].partition("[")[0]
    show = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run(
        [str(python), "-c", show], check=True, capture_output=True, text=True
    ).stdout.strip()


def _install_node(client: Client, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / client.script).write_text((PROGRAMS / client.script).read_text())
    (folder / "cases.mjs").write_text((PROGRAMS / "cases.mjs").read_text())
    install = ["npm", "install", "--silent", "--no-fund", "--no-audit", *client.packages]
    subprocess.run(install, check=True, capture_output=True, text=True, cwd=folder)
    package = folder / "node_modules" / client.packages[0] / "package.json"
    return str(json.loads(package.read_text())["version"])


def _end_of(text: str) -> str:
    return " ".join(text.strip().splitlines()[-1:])[:300] or "no output"


@contextmanager
def _server(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "xverse.cli", "serve", "--page", "none", "--port", str(port)]
    server = subprocess.Popen([*command, "--no-access-log"])
    try:
        _until_healthy(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def _until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        try:
            with opener.open(url, timeout=5):
                return
        except OSError:
            if server.poll() is not None:
                raise SystemExit("xverse serve ended") from None
            time.sleep(0.2)
    raise SystemExit("xverse serve did not become healthy")


if __name__ == "__main__":
    sys.exit(main())
