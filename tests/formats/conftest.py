from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .upstream import write_upstream_directory


@pytest.fixture(scope="session")
def model(tiny_config: Any) -> Any:
    """A small ``XverseForCausalLM`` with bfloat16 weights, which every test leaves as they are."""
    from xverse.model import XverseForCausalLM, init_weights

    model = XverseForCausalLM(tiny_config)
    init_weights(model, seed=0)
    with torch.no_grad():
        for layer in model.model.layers:  # a norm weight of 1 would hide a wrong norm
            layer.input_layernorm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model.bfloat16()


@pytest.fixture(scope="session")
def upstream(model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in upstream's published layout; read only."""
    directory = tmp_path_factory.mktemp("upstream")
    (directory / "tokenizer").mkdir()
    tiny_tokenizer.save(directory / "tokenizer")
    return write_upstream_directory(directory / "XVERSE-7B-Chat", model, directory / "tokenizer")
