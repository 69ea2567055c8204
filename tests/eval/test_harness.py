"""The engine as a model of lm-evaluation-harness, and the same prompts scored by both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.eval.run import load_benchmarks
from xverse.eval.scoring import make_prompts, score_prompts

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def harness(random_model: Path) -> Any:
    from xverse.eval.harness import Harness

    return Harness(model=str(random_model), threads=1)


def instance(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def test_it_is_registered() -> None:
    from lm_eval.api.registry import get_model

    from xverse.eval.harness import Harness

    assert get_model("xverse") is Harness


def test_log_likelihoods_are_those_of_its_own_backend(harness: Any, random_model: Path) -> None:
    """The harness's transformers backend on the same directory: sums, and whether greedy."""
    from lm_eval.models.huggingface import HFLM

    import xverse  # noqa: F401 - registers the Auto classes

    theirs = HFLM(pretrained=str(random_model), dtype="float32", batch_size=2, device="cpu")
    requests = [
        instance("loglikelihood", "The sea is", " blue"),
        instance("loglikelihood", "The sea is ", "blue and deep"),
        instance("loglikelihood", "Question: 1 + 1?\nAnswer:", " 2"),
        instance("loglikelihood", "你好，", "世界"),
    ]
    for text in ("One", "Two, three"):  # one that is greedy
        (reply,) = harness.generate_until(
            [instance("generate_until", text, {"until": [], "max_gen_toks": 4})]
        )
        if "�" not in reply and reply.strip():
            requests.append(instance("loglikelihood", text, reply))
    ours = harness.loglikelihood(requests)
    for one, other in zip(ours, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3)
        assert one[1] == other[1]


def test_rolling_log_likelihood(harness: Any) -> None:
    from xverse.model.attention import FullCausal

    engine = harness._engine
    text = "The sea is blue and deep. " * 5
    ids = [engine.tokenizer.eos_id, *engine.tokenizer.encode(text)]
    with torch.inference_mode():
        logits = engine.model(torch.tensor([ids]), FullCausal(1, len(ids)))[0].float()
    expected = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum().item()
    (found,) = harness.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    assert found == pytest.approx(expected, rel=1e-4)


def test_generation_stops(harness: Any) -> None:
    (whole,) = harness.generate_until([instance("generate_until", "One", {"until": [], "max_gen_toks": 8})])
    part = whole[2:3]
    (cut,) = harness.generate_until([instance("generate_until", "One", {"until": [part], "max_gen_toks": 8})])
    assert cut == whole[: whole.index(part)]


def test_our_prompts_as_a_task_there(
    harness: Any, engine_backend: Any, benchmarks: Path, tmp_path: Path
) -> None:
    """Identical strings: the accuracy that the harness finds is ours, question by question."""
    (mmlu,) = load_benchmarks(["mmlu"], benchmarks)
    rows, ours = [], []
    for subject in mmlu.subjects[:6]:
        for each in score_prompts(engine_backend, make_prompts(engine_backend, mmlu.benchmark, subject, 5)):
            ours.append(each.prediction == each.question.answer)
            rows.append({"prompt": each.prompt, "gold": "ABCD".index(each.question.answer or "A")})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "gold",
        "doc_to_choice": ["A", "B", "C", "D"],
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0, log_samples=True)
    assert found["results"]["ours"]["acc,none"] == pytest.approx(sum(ours) / len(ours))
    samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    assert [bool(sample["acc"]) for sample in samples] == ours
    assert [sample["arguments"][0][0] for sample in samples] == [row["prompt"] for row in rows]
