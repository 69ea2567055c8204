"""Benchmarks during training: a function of the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from xverse.engine import Engine
from xverse.eval.backends import EngineBackend
from xverse.eval.run import plan
from xverse.eval.scoring import answers, ask
from xverse.eval.statistics import score
from xverse.model import XverseForCausalLM
from xverse.tokenizer import Tokenizer


def evaluator(
    tasks: Sequence[str], data_dir: Path, *, limit: int, shots: int
) -> Callable[[XverseForCausalLM, Tokenizer], dict[str, float]]:
    """Reads the benchmarks at once, so that a missing one ends a run before it begins; the function returns
    the share of right answers of each. The model is left as it was."""
    plans = plan(tasks, data_dir, limit=limit)

    def evaluate(model: XverseForCausalLM, tokenizer: Tokenizer) -> dict[str, float]:
        engine = Engine(model, tokenizer, max_batch=16, max_cache_tokens=2 * model.config.context_length)
        backend = EngineBackend(engine, "in training")
        found = {}
        for each in plans:
            right = {}
            for subject in each.subjects:
                scored = answers(backend, ask(backend, each.benchmark, subject, shots))
                right[subject.name] = [one.prediction == one.question.answer for one in scored]
            found[each.benchmark.name] = score(right, each.benchmark.average).value
        return found

    return evaluate
