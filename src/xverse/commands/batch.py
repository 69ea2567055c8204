"""``xverse batch``: answer a file of requests, and continue after a crash where it ended."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import TYPE_CHECKING

from xverse.commands.sampling import given_sampling
from xverse.commands.serve import add_service_flags, service_settings
from xverse.config import need

if TYPE_CHECKING:
    from xverse.serve.app import InProcess
    from xverse.serve.batch_file import Answers, BatchRequest

_REPORT_SECONDS = 10.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="requests, one JSON object per line, in OpenAI's format", metavar="FILE")
    parser.add_argument(
        "--out", help="file of the answers; those that it already has are kept", required=True, metavar="FILE"
    )
    add_service_flags(parser)


def run(args: argparse.Namespace) -> int:
    sampling = given_sampling(args)
    need("fastapi", "serve", "xverse batch")
    need("prometheus_client", "serve", "xverse batch")
    need("llguidance", "serve", "xverse batch")
    from xverse.serve.app import InProcess
    from xverse.serve.batch_file import answers, read_requests
    from xverse.serve.caller import URLS
    from xverse.serve.start import load_service

    requests = read_requests(args.file, URLS)
    with answers(args.out, requests) as answered:
        if len(answered.given) < len(requests):
            service = load_service(service_settings(args, sampling))
            asyncio.run(_answer(InProcess(service), requests, answered, args.max_batch))
    failed = f"; {answered.failed} of the answers are errors" if answered.failed else ""
    print(f"{len(requests)} requests answered in {args.out}{failed}")
    return 1 if answered.failed else 0


async def _answer(app: InProcess, requests: list[BatchRequest], answered: Answers, at_once: int) -> None:
    from xverse.log import notice
    from xverse.serve.batch_file import answer_all

    reported = time.monotonic()

    def progress(done: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            notice(f"batch: {done} of {len(requests)} requests answered")

    if answered.given:
        notice(f"batch: {len(answered.given)} of {len(requests)} requests have answers; continuing")
    async with app.running():
        await answer_all(requests, answered, app.call, at_once, progress)
