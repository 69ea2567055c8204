"""The engine as a model of lm-evaluation-harness, and the same prompts scored by both."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scale import ALL
from xverse.config import UserError
from xverse.eval.run import load_benchmarks
from xverse.eval.scoring import make_prompts, score_prompts

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def harness(random_model: Path) -> Any:
    from xverse.eval.harness import Harness

    return Harness(pretrained=str(random_model), threads=1, max_length=300)


@pytest.fixture(scope="module")
def theirs(random_model: Path, harness: Any) -> Any:
    """The library's own model on the same directory. Random models write broken UTF-8, of which transformers
    replaces valid bytes, too; both decode as the engine does."""
    from lm_eval.models.huggingface import HFLM

    import xverse  # noqa: F401 - registers the Auto classes

    model = HFLM(pretrained=str(random_model), dtype="float32", batch_size=2, device="cpu", max_length=300)
    decode = harness._engine.tokenizer.decode

    def tok_decode(tokens: Any, skip_special_tokens: bool = True) -> str:
        return decode([tokens] if isinstance(tokens, int) else tokens, skip_special_tokens)

    model.tok_decode = tok_decode
    return model


def instances(kind: str, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each if isinstance(each, tuple) else (each,), 0) for each in arguments]


def generate(model: Any, *contexts: str, **settings: Any) -> list[str]:
    requests = instances("generate_until", *((context, dict(settings)) for context in contexts))
    return model.generate_until(requests, disable_tqdm=True)


def test_it_is_registered() -> None:
    from lm_eval.api.registry import get_model

    from xverse.eval.harness import Harness

    assert get_model("xverse") is Harness


PAIRS = [
    ("The sea is", " blue"),
    ("The sea is ", "blue and deep"),
    ("Question: 1 + 1?\nAnswer:", " 2"),
    ("Question: 1 + 1?\nAnswer:", " 3"),
    ("你好，", "世界"),
    ("", "The sea"),
    ("", "<|startoftext|>x"),
    ("a<|endoftext|>b", " c"),
    ("long " * 400, "end"),
    ("x", "long " * 50),
]


def test_log_likelihoods_are_those_of_the_librarys_model(harness: Any, theirs: Any) -> None:
    pairs = list(PAIRS)
    for text in ("One", "Two, three"):  # one that is greedy
        (reply,) = generate(harness, text, until=[], max_gen_toks=4)
        if "\ufffd" not in reply and reply.strip():
            pairs.append((text, reply))
    requests = instances("loglikelihood", *pairs)
    ours = harness.loglikelihood(requests)
    for pair, one, other in zip(pairs, ours, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3, rel=1e-4), pair
        assert one[1] == other[1], pair


def test_a_continuation_that_merges_into_the_context_is_encoded_alone(harness: Any) -> None:
    tokenizer = harness._engine.tokenizer
    merged = next(  # two characters that are one token
        (text[0], text[1])
        for text in (tokenizer.decode([index]).strip() for index in range(300, tokenizer.vocab_size))
        if len(text) == 2 and len(tokenizer.encode("x" + text)) == len(tokenizer.encode("x" + text[0]))
    )
    pairs = [("x" + merged[0], merged[1]), ("The sea", ""), ("", "")]
    (whole, greedy), *empty = harness.loglikelihood(instances("loglikelihood", *pairs))
    alone = tokenizer.encode(merged[1])
    ((expected, likeliest),) = harness._loglikelihood_tokens([(None, tokenizer.encode(pairs[0][0]), alone)])
    assert (whole, greedy) == (pytest.approx(expected), likeliest)
    assert whole < 0
    assert empty == [(0.0, True), (0.0, True)]


def test_rolling_log_likelihoods(harness: Any, theirs: Any) -> None:
    requests = instances("loglikelihood_rolling", "The sea is blue and deep. " * 5, "word " * 500, "你")
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert harness.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"until": []},
        {"until": "e"},
        {"until": ["e", "\n"], "do_sample": False},
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 1.0, "top_k": 1},
        {"do_sample": True, "temperature": 0.5, "top_p": 1e-6},
        {"max_gen_toks": None, "max_new_tokens": 3},
        {"max_gen_toks": None, "max_tokens": 2},
        {"num_beams": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_generation_settings(harness: Any, theirs: Any, settings: dict[str, Any]) -> None:
    settings = {"max_gen_toks": 8, **settings}
    settings = {key: value for key, value in settings.items() if value is not None}
    contexts = ["One", "Two, three", "你好"]
    ours = generate(harness, *contexts, **settings)
    assert ours == [text for context in contexts for text in generate(theirs, context, **settings)]


def test_a_tasks_end_token_is_not_part_of_the_reply(harness: Any) -> None:
    (whole,) = generate(harness, "Two, three", max_gen_toks=4)
    (cut,) = generate(harness, "Two, three", max_gen_toks=4, eos_token_id=list(range(4, 700)))
    assert (bool(whole), cut) == (True, "")


def test_sampling_follows_the_librarys_seed(harness: Any) -> None:
    replies = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        replies.append(generate(harness, "One", "One", do_sample=True, temperature=1.5, max_gen_toks=8))
    assert replies[0] == replies[1] != replies[2]
    assert replies[0][0] != replies[0][1]
    fixed = [generate(harness, "One", do_sample=True, temperature=1.5, seed=5)[0][:20] for _ in range(2)]
    assert fixed[0] == fixed[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "not supported: num_beams=2"),
        ({"untill": ["x"]}, "did you mean 'until'"),
        ({"do_sample": True}, "temperature above 0"),
        ({"top_p": 7}, "top_p"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        (
            {"max_gen_toks": 300},
            "Invalid configuration: requested max tokens to generate \\(300\\) must be less",
        ),
        ({"max_gen_toks": 16384}, "maximum sequence length \\(300\\)"),
    ],
)
def test_generation_settings_that_are_refused(harness: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(harness, "One", **settings)


def test_truncation_is_reported_and_as_the_librarys(
    harness: Any, theirs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lm_eval"):
        ours = generate(harness, "one two three " * 200, "One", max_gen_toks=4)
    assert "Left truncation applied. Original sequence length was" in caplog.text
    assert "1 of 2 prompts were truncated" in caplog.text
    assert ours[0] == generate(theirs, "one two three " * 200, max_gen_toks=4)[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lm_eval"):
        harness.loglikelihood(instances("loglikelihood", ("long " * 400, "end"), ("a", " b")))
    assert "exceeds model's maximum length (300)" in caplog.text
    assert "1 of 2 contexts were truncated" in caplog.text
    with pytest.raises(UserError, match=r"the continuation has \d+ tokens, more than max_length"):
        harness.loglikelihood(instances("loglikelihood", ("a", "long " * 400)))
    assert generate(harness, "", max_gen_toks=2)  # an empty context begins with the prefix


def test_model_args(random_model: Path) -> None:
    from lm_eval.api.registry import get_model

    kind = get_model("xverse")
    made = kind.create_from_arg_string(
        f"pretrained={random_model},dtype=float32,max_length=64,add_bos_token=True,prefix_token_id=3,"
        "trust_remote_code=True,backend=causal,think_end_token=</t>,max_gen_toks=5",
        {"batch_size": 2, "max_batch_size": None, "device": "cpu"},
    )
    assert (made.max_length, made.max_gen_toks, made.prefix_token_id) == (64, 5, 3)
    assert made.tok_encode("a")[0] == 2
    assert made.tok_encode("<|startoftext|>a").count(2) == 1
    assert made.tok_encode("a", add_special_tokens=False)[0] != 2
    assert made._engine.max_batch == 2 if hasattr(made._engine, "max_batch") else True
    for arguments, message in [
        ("", "pretrained: name the model"),
        (f"model={random_model}", "did you mean 'pretrained'"),
        (f"pretrained={random_model},max_lenght=3", "did you mean 'max_length'"),
        (f"pretrained={random_model},load_in_8bit=True", "unknown key 'load_in_8bit'"),
        (f"pretrained={random_model},dtype=float16", "dtype: the engine computes this model in float32"),
        (f"pretrained={random_model},max_length=100000", "max_length: 100000 is out of range"),
        (f"pretrained={random_model},backend=seq2seq", "backend: 'seq2seq' is not supported"),
        (f"pretrained={random_model},parallelize=True", "parallelize"),
        (f"pretrained={random_model},revision=dev", "revision: 'dev'"),
        (f"pretrained={random_model},prefix_token_id=99999", "prefix_token_id"),
        (f"pretrained={random_model},batch_size=many", "batch_size"),
        ("pretrained=/no/such/model", "/no/such/model"),
    ]:
        with pytest.raises(UserError, match=message):
            kind.create_from_arg_string(arguments, {})


def test_chat_template(harness: Any, theirs: Any) -> None:
    history = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好"}]
    answered = [*history, {"role": "assistant", "content": "Hello"}]
    assert harness.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert harness.apply_chat_template(answered, False) == theirs.apply_chat_template(answered, False)
    assert harness.chat_template(True) == theirs.chat_template(True)
    assert harness.tokenizer_name == theirs.tokenizer_name
    text = harness.apply_chat_template(answered, False)
    assert harness.tok_encode(text) == theirs.tok_encode(text)


@pytest.mark.thorough
def test_our_prompts_as_a_task_there(
    harness: Any, engine_backend: Any, benchmarks: Path, tmp_path: Path
) -> None:
    """Identical strings: the accuracy that the harness finds is ours, question by question."""
    (mmlu,) = load_benchmarks(["mmlu"], benchmarks)
    rows, ours = [], []
    for subject in mmlu.subjects[: 6 if ALL else 2]:
        for each in score_prompts(engine_backend, make_prompts(engine_backend, mmlu.benchmark, subject, 5)):
            ours.append(each.prediction == each.question.answer)
            rows.append({"prompt": each.prompt.prompt, "gold": "ABCD".index(each.question.answer or "A")})
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
