"""Runs the cases of a client's script and prints which passed, as one line of JSON."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

URL = os.environ["XVERSE_URL"]
QUESTION = "What is your name?"
_CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Decorator: the function's name is the case's."""
    _CASES[function.__name__] = function
    return function


def command(*arguments: str, **options: Any) -> str:
    """The output of a command line program. Raises RuntimeError with its last lines if it fails."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500, check=False, **options)
    if done.returncode:
        raise RuntimeError(" ".join((done.stdout + done.stderr).strip().splitlines()[-3:]))
    return done.stdout + done.stderr


def run() -> None:
    passed, failed = [], {}
    for name, function in _CASES.items():
        try:
            result = function()
            if inspect.isawaitable(result):
                asyncio.run(_awaited(result))
            passed.append(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(json.dumps({"passed": passed, "failed": failed}))


async def _awaited(result: Any) -> None:
    await result
