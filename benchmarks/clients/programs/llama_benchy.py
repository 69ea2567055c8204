"""llama-benchy: a short measurement must collect results. It measures on the text of a book, from a URL."""

import functools
import http.server
import os
import threading
from pathlib import Path

from cases import URL, case, command, run


@case
def measures():
    Path("book.txt").write_text("It was a bright cold day, and the clocks were striking. " * 2000)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=".")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    said = command(
        *(
            "llama-benchy",
            "--base-url",
            URL,
            "--model",
            "nano",
            "--tokenizer",
            os.environ["XVERSE_TOKENIZER"],
        ),
        *("--book-url", f"http://127.0.0.1:{server.server_port}/book.txt"),
        *("--pp", "64", "--tg", "16", "--exact-tg", "--runs", "1", "--no-cache", "--exit-on-first-fail"),
    )
    assert "tg16" in said, said[-300:]
    assert "No results" not in said, said[-300:]


run()
