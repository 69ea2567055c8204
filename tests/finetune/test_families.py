"""Fine-tuning of XVERSE's relatives: their own chat templates with loss masks; results that others load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.family_zoo import CHATML, write_family, write_tokenizer
from xverse.cli import main
from xverse.config import UserError
from xverse.finetune.dialogue import encode_within
from xverse.formats import ModelDirectory, load_model
from xverse.model import FullCausal
from xverse.tokenizer import Tokenizer, encode_chat, encode_dialogue
from xverse.tokenizer.general import load_tokenizer_of
from xverse.train.plot import read_metrics

DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hello <|im_end|> 中文"},
    {"role": "assistant", "content": "good morning"},
    {"role": "user", "content": "count"},
    {"role": "assistant", "content": "one two\n\nthree"},
]
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Qwen3's: thoughts are written for the last reply only.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [
        *(f"say hello {i}, count to {i}. good morning and again one two three" for i in range(30)),
        CHATML,
    ]


@pytest.fixture
def with_template(texts: list[str], tmp_path: Path) -> Any:
    def make(template: str) -> Tokenizer:
        write_tokenizer(tmp_path / "tokenizer", texts, template)
        return load_tokenizer_of(tmp_path / "tokenizer")

    return make


def learned(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> list[str]:
    """The texts of the runs of tokens with loss."""
    runs: list[list[int]] = []
    before = False
    for token, kept in zip(ids, mask, strict=True):
        if kept and not before:
            runs.append([])
        if kept:
            runs[-1].append(token)
        before = kept
    return [tokenizer.decode(run, skip_special=False) for run in runs]


def test_replies_and_their_ends_have_loss(with_template: Any) -> None:
    tokenizer = with_template(CHATML)
    ids, mask = encode_dialogue(tokenizer, DIALOGUE)
    assert learned(tokenizer, ids, mask) == ["good morning<|im_end|>", "one two\n\nthree<|im_end|>"]
    assert ids.count(tokenizer.eos_id) == 5  # the one that the user spells is text
    prompt = encode_chat(tokenizer, DIALOGUE[:-1], max_new_tokens=8)
    first = len(mask) - mask[::-1].index(True) - sum(mask[len(prompt.ids) :])
    assert ids[: len(prompt.ids)] == prompt.ids  # what chat sends is what training saw
    assert first == len(prompt.ids)
    ids, mask = encode_dialogue(tokenizer, DIALOGUE, last_only=True)
    assert learned(tokenizer, ids, mask) == ["one two\n\nthree<|im_end|>"]


def test_other_templates(with_template: Any) -> None:
    tokenizer = with_template(LLAMA2)
    ids, mask = encode_dialogue(tokenizer, DIALOGUE[1:])
    assert learned(tokenizer, ids, mask) == [" good morning<|im_end|>", " one two\n\nthree<|im_end|>"]
    with pytest.raises(UserError, match="no system"):
        encode_dialogue(tokenizer, DIALOGUE)
    tokenizer = with_template(WITHOUT_END)
    ids, mask = encode_dialogue(tokenizer, DIALOGUE)
    assert learned(tokenizer, ids, mask)[-1] == " one two\n\nthree\n<|im_end|>"  # the space is in " one"
    tokenizer = with_template(THINKING)
    with pytest.raises(UserError, match="set mask_history") as error:
        encode_dialogue(tokenizer, DIALOGUE)
    assert "\n" not in str(error.value)
    ids, mask = encode_dialogue(tokenizer, DIALOGUE, last_only=True)
    assert learned(tokenizer, ids, mask) == ["<think>\n\n</think>\n\none two\n\nthree<|im_end|>"]


@pytest.mark.parametrize("last_only", [False, True])
def test_long_dialogues_are_cut(with_template: Any, last_only: bool) -> None:
    tokenizer = with_template(CHATML)
    whole = len(encode_dialogue(tokenizer, DIALOGUE)[0])
    seen = set()
    for length in range(12, whole + 1):
        try:
            ids, mask, what = encode_within(tokenizer, DIALOGUE, length, last_only)
        except UserError as error:
            assert "leaves no room" in str(error)  # noqa: PT017 (for the shortest only)
            assert not seen
            continue
        assert len(ids) <= length
        assert any(mask)
        seen.add(what)
    assert "" in seen
    assert "lost their oldest rounds" in seen


CASES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "sft of all weights": ("Llama", {"tie_word_embeddings": True}, {"learning_rate": "5e-3"}),
    "bfloat16": ("Qwen3", {}, {"learning_rate": "5e-3", "bf16": ""}),
    "lora": ("Qwen2", {}, {"finetuning_type": "lora", "learning_rate": "3e-2"}),
    "qlora": ("Llama", {"tie_word_embeddings": True}, {"quantization_bit": "8", "learning_rate": "3e-2"}),
    "dpo": ("Mistral", {"sliding_window": None}, {"stage": "dpo", "learning_rate": "3e-2"}),
    "text": ("Llama", {}, {"stage": "pt", "finetuning_type": "full", "learning_rate": "2e-2"}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_method_learns_and_the_result_loads(
    case: str, texts: list[str], document: dict[str, str], flags: Any, folder: Path, tmp_path: Path
) -> None:
    family, changes, extra = CASES[case]
    write_family(tmp_path / "base", texts, family, **changes)
    document |= {"bf16": "false", "val_size": "4", "num_train_epochs": "2", "plot_loss": "false", **extra}
    document |= {"eval_on_start": "", "cutoff_len": "128"}
    if case in ("qlora", "dpo"):
        document["finetuning_type"] = "lora"
    if case == "dpo":
        rows = [
            {
                "conversations": [{"from": "human", "value": f"say hello {i}"}],
                "chosen": {"from": "gpt", "value": "good morning"},
                "rejected": {"from": "gpt", "value": "one two three"},
            }
            for i in range(40)
        ]
        (folder / "pairs.json").write_text(json.dumps(rows))
        document["dataset"] = "pairs.json"
    if case == "text":
        (folder / "texts.txt").write_text("\n".join(texts[:30]))
        document["dataset"] = "texts.txt"
    with torch.enable_grad():
        assert main(["finetune", *flags(document)]) == 0
    out = tmp_path / "out"
    held_out = [r["valid"]["all"] for r in read_metrics(out / "metrics.jsonl") if "valid" in r]
    # The base is random, and an adapter changes little of it.
    most = 0.96 if document["finetuning_type"] == "lora" else 0.8
    assert min(held_out) < most * held_out[0]
    directory = ModelDirectory.of(tmp_path / "base")
    if document["finetuning_type"] == "lora":
        merged = tmp_path / "merged"
        words = ["--model", str(tmp_path / "base"), "--adapter", str(out), "--out", str(merged)]
        assert main(["export", *words, "--format", "hf"]) == 0
        out = merged
    result = ModelDirectory.of(out)
    assert result.tokenizer.template == directory.tokenizer.template
    assert result.config == directory.config
    ours = load_model(result)
    tokens = torch.arange(40)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(theirs).__name__ == f"{family}ForCausalLM"
    assert torch.allclose(ours(tokens, FullCausal(1, 40)), theirs(tokens).logits, atol=1e-4)


def test_what_does_not_fit_is_refused(
    texts: list[str], document: dict[str, str], flags: Any, tmp_path: Path, capsys: Any
) -> None:
    write_family(tmp_path / "base", texts, "Llama", tie_word_embeddings=True)
    for changes, message in (
        ({"template": "xverse"}, "has a chat template of its own"),
        ({"template": "qwen"}, "template 'qwen' is not known"),
        ({"finetuning_type": "lora", "additional_target": "lm_head"}, "share one weight"),
    ):
        assert main(["finetune", *flags({**document, **changes})]) == 2
        assert message in capsys.readouterr().err
