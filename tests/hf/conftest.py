"""Model directories in xverse's and in upstream's form, with a small random model."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

GENERATION = {
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 30,
    "top_p": 0.85,
    "repetition_penalty": 1.1,
    "max_new_tokens": 8,
}

# By path: the tests are no package, and the rooms' files may share names.
_spec = importlib.util.spec_from_file_location(
    "upstream_builder", Path(__file__).parents[1] / "formats" / "upstream.py"
)
assert _spec is not None
assert _spec.loader is not None
builder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(builder)


@pytest.fixture(scope="session")
def core_model(tiny_config: Any) -> Any:
    """Weights large enough that greedy choices are stable and logits reach 7."""
    from xverse.model import XverseForCausalLM, init_weights

    model = XverseForCausalLM(replace(tiny_config, initializer_range=0.2))
    init_weights(model, seed=0)
    return model.eval()


@pytest.fixture(scope="session")
def written(core_model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory written by xverse."""
    from xverse.formats import save_hf

    path = tmp_path_factory.mktemp("written") / "model"
    save_hf(core_model, tiny_tokenizer, path, torch.float32, GENERATION)
    return path


@pytest.fixture(scope="session")
def upstream(core_model: Any, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as published by upstream, with short replies and one more poisoned file."""
    path = tmp_path_factory.mktemp("published") / "XVERSE-7B-Chat"
    builder.write_upstream_directory(path, core_model, tokenizer_dir=written)
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(builder.POISON)
    (path / "generation_config.json").write_text(json.dumps(GENERATION))
    return path


@pytest.fixture
def hf_model(written: Path) -> Any:
    from transformers import AutoModelForCausalLM

    import xverse  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(written)


@pytest.fixture
def llama(core_model: Any) -> Any:
    """Stock transformers on the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from xverse.formats.write import llama_config

    values = llama_config(core_model.config, torch.float32)
    values.pop("torch_dtype")
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(core_model.state_dict())
    return model.eval()


@pytest.fixture(scope="session")
def pair(core_model: Any) -> dict[str, tuple[Any, Any]]:
    """Our model and stock Llama on the same weights, for each implementation of attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from xverse.formats.write import llama_config
    from xverse.hf import XverseConfig, XverseForCausalLM

    values = llama_config(core_model.config, torch.float32)
    values.pop("torch_dtype")
    pairs = {}
    for name in ("sdpa", "eager"):
        ours = XverseForCausalLM(
            XverseConfig.from_model_config(core_model.config, attn_implementation=name, head_dim=16)
        )
        theirs = LlamaForCausalLM(LlamaConfig(**values, attn_implementation=name))
        for model in (ours, theirs):
            model.load_state_dict(core_model.state_dict())
            model.eval()
        pairs[name] = (ours, theirs)
    return pairs


@pytest.fixture
def hf_tokenizer(written: Path) -> Any:
    from transformers import AutoTokenizer

    import xverse  # noqa: F401

    return AutoTokenizer.from_pretrained(written)
