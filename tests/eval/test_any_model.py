"""Any causal language model of transformers is scored; where the engine has it too, both agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.family_zoo import write_family, write_tokenizer
from xverse.config import UserError
from xverse.eval.any_model import load_any
from xverse.eval.backends import EngineBackend, TransformersBackend, load_backend
from xverse.eval.generation import TaskRun, TaskSettings, generate
from xverse.eval.tasks import TASKS
from xverse.formats import ModelDirectory
from xverse.tokenizer import encode_chat

ITEMS = [(list(range(5, 30)), [[7], [8], [9]]), (list(range(5, 28)), [[7, 9], [8], [9, 3, 4]])]


def load(path: Path, which: str | None) -> Any:
    return load_backend(str(path), which=which, quantize=None, threads=None, kv_dtype="auto", device="cpu")


def test_a_relative_by_engine_and_transformers(tiny_texts: list[str], tmp_path: Path) -> None:
    write_family(tmp_path, tiny_texts, "Qwen2", tie_word_embeddings=True)
    ours, theirs = load(tmp_path, None), load(tmp_path, "transformers")
    assert isinstance(ours, EngineBackend)
    assert isinstance(theirs, TransformersBackend)
    assert ours.encode(["good morning"]) == theirs.encode(["good morning"])
    assert ours.context == theirs.context == 256
    for one, other in zip(ours.score(ITEMS), theirs.score(ITEMS), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
        (
            "GPTNeoX",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        ),
    ],
)
@torch.no_grad()
def test_a_family_that_the_engine_lacks(
    kind: str, sizes: dict[str, int], tiny_texts: list[str], tmp_path: Path
) -> None:
    size = write_tokenizer(tmp_path, tiny_texts, None)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=size, bos_token_id=0, eos_token_id=0, **sizes)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        config
    ).eval()
    model.save_pretrained(tmp_path)
    backend = load(tmp_path, None)
    assert isinstance(backend, TransformersBackend)
    prompt, (first, *_) = ITEMS[0]
    expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[first[0]].item()
    assert backend.score(ITEMS)[0][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "t5"}, "t5 is not a causal language model"),
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}},
            "code in a model's directory",
        ),
        ({"model_type": "gpt2", "n_embd": "many"}, "transformers cannot load it"),
    ],
)
def test_what_cannot_be_scored(
    values: dict[str, Any], message: str, tiny_texts: list[str], tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, tiny_texts, None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        load_any(ModelDirectory.of(tmp_path))
    assert "\n" not in str(error.value)


def test_generating_tasks_by_transformers_equal_the_engines(
    tiny_texts: list[str], tmp_path: Path, test_data: Path
) -> None:
    write_family(tmp_path / "m", tiny_texts, "Qwen2", max_position_embeddings=4096)
    # Penalties in the directory have no effect on the likeliest text.
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 2, "repetition_penalty": 1.5}')
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "en.txt").write_text("good morning to you\n\nand again one two three")
    found = []
    for which in ("engine", "transformers"):
        backend = load(tmp_path / "m", which)
        assert backend.stop_ids == (2,)
        prompts = [list(range(5, 30)), list(range(9, 20))]
        options: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": backend.stop_ids}
        plain = generate(backend.engine, prompts, **options)
        cut = generate(backend.engine, prompts, stop=[plain[0][0][3:5]], **options)
        assert cut[0][1] == "stop"
        settings = TaskSettings(texts=tmp_path / "texts")
        outcome = TASKS["ppl"](
            TaskRun(backend.engine, backend.stop_ids, test_data, settings, lambda done, total: None)
        )
        talk = encode_chat(backend.engine.tokenizer, [{"role": "user", "content": "hello"}], max_new_tokens=8)
        found.append((plain, cut, outcome.figures, talk.ids))
    assert found[0][0:2] == found[1][0:2]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-4)
    assert found[0][3] == found[1][3]
