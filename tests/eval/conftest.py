"""A small benchmark of each kind in files, and a small model with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from xverse.data.benchmarks.ceval import COLUMNS
from xverse.data.benchmarks.mmlu import SUBJECTS

QUESTIONS = ["How many legs has a horse, {}?", 'What is "{}", or\nis it?', "Which is larger, {} or 2?"]


def csv_row(cells: Sequence[str]) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n"


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of MMLU and C-Eval as their authors publish them, with few questions."""
    root = tmp_path_factory.mktemp("eval")
    for split, count in (("dev", 5), ("test", 4), ("val", 3)):
        folder = root / "mmlu" / "data" / split
        folder.mkdir(parents=True)
        for seed, name in enumerate(sorted(SUBJECTS)):
            rows = [
                csv_row(
                    [
                        QUESTIONS[n % 3].format(f"{name} {n}"),
                        "one",
                        "two",
                        f"{n}",
                        "None",
                        "ABCD"[(seed + n) % 4],
                    ]
                )
                for n in range(count)
            ]
            (folder / f"{name}_{split}.csv").write_text("".join(rows), encoding="utf-8")
    mapping = {"accountant": ["Accountant", "注册会计师", "Other"], "law": ["Law", "法学", "Humanities"]}
    for split, count in (("dev", 5), ("val", 6), ("test", 3)):
        folder = root / "ceval" / split
        folder.mkdir(parents=True)
        for name in mapping:
            columns = COLUMNS if split == "test" else (*COLUMNS, "answer")
            rows = [
                csv_row([str(n), f"问题{n}？", "甲", "乙", "丙", "丁", "ABCD"[n % 4]][: len(columns)])
                for n in range(count)
            ]
            text = ",".join(columns) + "\n" + "".join(rows)
            (folder / f"{name}_{split}.csv").write_text(text, encoding="utf-8")
    (root / "ceval" / "subject_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def random_model(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: two layers of random weights, with room for long prompts."""
    from xverse.formats import save_hf
    from xverse.model import XverseConfig
    from xverse.model.transformer import XverseForCausalLM, init_weights

    config = XverseConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.2,
    )
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    path = tmp_path_factory.mktemp("models") / "random"
    save_hf(model, tiny_tokenizer, path)
    return path


@pytest.fixture
def engine_backend(random_model: Path) -> Any:
    from xverse.eval.backends import EngineBackend

    return EngineBackend.load(str(random_model), quantize=None, threads=1, max_cache_tokens=40_000)


class Oracle:
    """Knows the answers, or avoids them: a backend without a model. It knows a question by its prompt."""

    name = "oracle"
    context = 10**9
    dtype = "none"

    def __init__(self, plans: Sequence[Any], *, right: bool, shots: int = 5) -> None:
        self._answers: dict[str, list[tuple[str, str]]] = {}
        for plan in plans:
            for subject in plan.subjects:
                for question in subject.questions:
                    prompt = plan.benchmark.prompt(subject, question, shots)
                    # Some questions stand there twice, with different answers.
                    self._answers.setdefault(prompt, []).append((question.letters, question.answer))
        self._right = right

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]

    def score(self, items: Any, progress: Callable[[int], None] | None = None) -> list[list[float]]:
        found = []
        for ids, continuations in items:
            text = "".join(map(chr, ids))
            letters, answer = (self._answers.get(text) or self._answers[text.removesuffix(" ")]).pop(0)
            assert len(continuations) == len(letters)
            found.append([-0.1 if (letter == answer) == self._right else -9.0 for letter in letters])
        return found


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle
