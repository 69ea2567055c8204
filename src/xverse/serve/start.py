"""From the command line's settings to a service that is ready to run."""

from __future__ import annotations

import argparse
from pathlib import Path

from xverse.engine import Speculation
from xverse.engine.load import load_engine
from xverse.serve.grammar import Grammars
from xverse.serve.metrics import Metrics
from xverse.serve.runner import EngineRunner
from xverse.serve.service import Service


def load_service(args: argparse.Namespace) -> Service:
    """Load the model. Raises UserError for what cannot be loaded, or does not fit."""
    loaded = load_engine(
        args.model,
        threads=args.threads,
        quantize=args.quantize,
        tokenizer=args.tokenizer,
        adapter=args.adapter,
        max_batch=args.max_batch,
        max_cache_tokens=args.max_cache_tokens,
        kv_dtype=args.kv_dtype,
        speculation=Speculation() if args.speculate else None,
    )
    tokenizer = loaded.engine.tokenizer
    runner = EngineRunner(loaded.engine, max_waiting=args.max_waiting)
    return Service(
        runner=runner,
        tokenizer=tokenizer,
        name=args.name or Path(args.model).name,
        sampling=loaded.sampling,
        stop_ids=loaded.stop_ids,
        grammars=Grammars(tokenizer, loaded.stop_ids),
        metrics=Metrics(runner),
        timeout=args.timeout,
    )
