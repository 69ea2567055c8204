"""An XVERSE directory as upstream publishes it, written from a small model, for tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

POISON = 'raise RuntimeError("the directory\'s own code was run")\n'


def write_upstream_directory(path: Path, model: Any, tokenizer_dir: Path, shards: int = 3) -> Path:
    """Write ``model`` to ``path`` in upstream's published layout and return ``path``.

    bfloat16 ``.bin`` shards with an index and ``inv_freq`` buffers, upstream's config keys and ``auto_map``,
    a tokenizer.json that current libraries refuse, and model code that raises if it is ever run.
    ``tokenizer_dir`` holds the sound tokenizer.json to break.
    """
    path.mkdir(parents=True)
    config = model.config
    write_json(
        path / "config.json",
        {
            "architectures": ["XverseForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_xverse.XverseConfig",
                "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM",
            },
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": 8192,
            "max_tokenizer_truncation": 6144,
            "model_type": "xverse",
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.29.1",
            "use_cache": True,
            "vocab_size": config.vocab_size,
        },
    )
    write_json(
        path / "generation_config.json",
        {
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "do_sample": True,
            "temperature": 0.5,
            "top_k": 30,
            "top_p": 0.85,
            "repetition_penalty": 1.1,
            "max_new_tokens": 2048,
            "transformers_version": "4.29.1",
        },
    )
    values = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(path / "tokenizer.json", break_tokenizer(values))
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for name in ("configuration_xverse.py", "modeling_xverse.py"):
        (path / name).write_text(POISON)
    write_bin_shards(path, {name: t.bfloat16() for name, t in model.state_dict().items()}, config, shards)
    return path


def write_bin_shards(path: Path, state: dict[str, torch.Tensor], config: Any, shards: int) -> None:
    """``pytorch_model-0000i-of-0000n.bin`` and their index, with upstream's ``inv_freq`` buffers."""
    state = dict(state)
    inv_freq = 10000.0 ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    for layer in range(config.num_hidden_layers):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inv_freq.clone()
    names = sorted(state)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        chosen = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        torch.save({name: state[name].detach().clone() for name in chosen}, path / file)
        weight_map.update(dict.fromkeys(chosen, file))
    size = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(path / "pytorch_model.bin.index.json", index)


def break_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json as upstream's: ``add_prefix_space: false`` without ``prepend_scheme``."""
    values = copy.deepcopy(values)

    def visit(part: Any) -> None:
        if isinstance(part, dict):
            if part.get("type") == "Metaspace":
                part.pop("prepend_scheme", None)
                part.pop("split", None)
                part["add_prefix_space"] = False
            for item in part.values():
                visit(item)
        elif isinstance(part, list):
            for item in part:
                visit(item)

    visit(values["pre_tokenizer"])
    visit(values["decoder"])
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
