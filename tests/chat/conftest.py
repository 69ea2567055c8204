"""Model directories with known replies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xverse.formats import save_hf
from xverse.tokenizer import Tokenizer, train_tokenizer

from .reciter import RECITED, reciter


@pytest.fixture(scope="session")
def chat_tokenizer(tiny_texts: list[str]) -> Tokenizer:
    return train_tokenizer(
        tiny_texts, vocab_size=800, min_frequency=1, initial_characters=RECITED.replace("👋", "")
    )


GENERATION = {"do_sample": True, "temperature": 0.3, "max_new_tokens": 100, "eos_token_id": 3}


@pytest.fixture(scope="session")
def reciting_model(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Tokenizer) -> Path:
    """Replies RECITED and ends."""
    path = tmp_path_factory.mktemp("models") / "reciting"
    save_hf(reciter(chat_tokenizer, RECITED), chat_tokenizer, path, torch.bfloat16, GENERATION)
    return path


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Tokenizer) -> Path:
    """Repeats RECITED for many seconds."""
    path = tmp_path_factory.mktemp("models") / "endless"
    model = reciter(chat_tokenizer, RECITED, positions=32768, endless=True)
    save_hf(model, chat_tokenizer, path, torch.bfloat16, {**GENERATION, "max_new_tokens": 30000})
    return path
