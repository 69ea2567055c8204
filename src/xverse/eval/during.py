"""Benchmarks during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xverse.engine import Engine
from xverse.eval.backends import EngineBackend
from xverse.eval.run import load_benchmarks
from xverse.eval.scoring import make_prompts, score_prompts
from xverse.eval.statistics import score
from xverse.model import XverseForCausalLM
from xverse.tokenizer import Tokenizer

if TYPE_CHECKING:
    from xverse.train.pretrain import Evaluate


def evaluator(tasks: Sequence[str], data_dir: Path, *, limit: int, shots: int) -> Evaluate:
    """A function that returns each benchmark's score of a model, which it does not change. It calls its third
    argument after each subject.

    The benchmarks are read here, so that a missing one stops a run before training starts.
    """
    loaded = load_benchmarks(tasks, data_dir, limit=limit)

    def evaluate(
        model: XverseForCausalLM, tokenizer: Tokenizer, progress: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        engine = Engine(model, tokenizer, max_batch=16, max_cache_tokens=2 * model.config.context_length)
        backend = EngineBackend(engine, "in training")
        values = {}
        for part in loaded:
            right = {}
            for subject in part.subjects:
                answers = score_prompts(backend, make_prompts(backend, part.benchmark, subject, shots))
                right[subject.name] = [answer.prediction == answer.question.answer for answer in answers]
                progress()
            values[part.benchmark.name] = score(right, part.benchmark.average).value
        return values

    return evaluate
