"""The reference: a model whose greedy choices do not depend on rounding, run without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xverse.model.attention import FullCausal
from xverse.model.transformer import XverseForCausalLM


@pytest.fixture
def model(tiny_model: XverseForCausalLM) -> XverseForCausalLM:
    """A tiny model with its weights scaled so that the logits are far apart."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return tiny_model


@pytest.fixture
def naive() -> Callable[[Any, list[int], int], list[int]]:
    """``naive(model, prompt, n)``: n greedy tokens, by a full forward pass for each."""
    known: dict[tuple[int, ...], int] = {}

    def generate(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(new_tokens):
                if tuple(ids) not in known:
                    logits = model(torch.tensor([ids]), FullCausal(1, len(ids)))  # [1, T, V]
                    known[tuple(ids)] = int(logits[0, -1].argmax())
                ids.append(known[tuple(ids)])
        return ids[len(prompt) :]

    return generate
