"""``library_trainer.py REPORT TEXTS SETTINGS``: train with the ``tokenizers`` library, fed file by file.

The tokenizer has XVERSE's structure and the alphabet in SETTINGS. Writes seconds, peak memory and its hash to
REPORT as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from xverse.hardware import process_memory
from xverse.texts import ReadReport, find_files, read_texts
from xverse.tokenizer.counting import plan_parts
from xverse.tokenizer.train import assemble, library_merges


def run(report: Path, folder: str, settings: dict[str, object]) -> None:
    start = time.perf_counter()
    spans = [span for part in plan_parts(find_files([folder])) for span in part]
    blocks = (b for s in spans for b in read_texts(s.path, ReadReport(), s.begin, s.end))
    texts = (block.decode() for block in blocks)
    merges = library_merges(texts, settings["vocab_size"], settings["alphabet"], settings["others"])  # type: ignore[arg-type]
    tokenizer = assemble(settings["alphabet"], merges)  # type: ignore[arg-type]
    figures = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": process_memory("VmHWM"),
        "hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
    }
    report.write_text(json.dumps(figures))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))
