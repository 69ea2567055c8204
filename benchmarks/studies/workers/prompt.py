"""``prompt.py MODEL KV TOKENS THREADS``: read a prompt and decode 8 tokens up to TOKENS positions; prints the
seconds and the peak memory of this process as JSON."""

from __future__ import annotations

import json
import sys
import time

import torch

from xverse.engine import Engine, Request, SamplingParams
from xverse.formats import load_model, load_tokenizer
from xverse.hardware import process_memory

NEW_TOKENS = 8


def run(directory: str, kv_dtype: str, tokens: int, threads: int) -> None:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = load_model(directory)
    loaded = time.perf_counter() - start
    engine = Engine(model, load_tokenizer(directory), kv_dtype=kv_dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, model.config.vocab_size, (tokens - NEW_TOKENS,), generator=generator)
    request = Request(prompt_ids=ids.tolist(), sampling=SamplingParams.greedy(NEW_TOKENS), stop_ids=())
    start = time.perf_counter()
    events = list(engine.stream(request))
    assert len(events) == NEW_TOKENS, events[-1]
    assert not any(event.error for event in events), events[-1]
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": process_memory("VmHWM"), "load_s": loaded, "prompt_s": seconds}))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
