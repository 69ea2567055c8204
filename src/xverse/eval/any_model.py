"""Any causal language model of transformers, from its directory. Code in the directory never runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model
from xverse.log import notice
from xverse.model.families import FAMILIES
from xverse.tokenizer.general import before

_POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx")
_UNBOUNDED = 2048  # tokens of a prompt, for models whose configuration gives no limit
Encode = Callable[[str], list[int]]


def load_any(directory: ModelDirectory) -> tuple[Any, Encode, int]:
    """The model on the CPU in its stored type, a function from text to ids, with what the model's tokenizer
    puts before a text, and the context length.

    Models whose published code transformers lacks run in this project's forward pass, or are translated by
    ``formats/foreign``, if either knows them. Raises UserError for others, for models of
    transformers that are not causal language models, and for what transformers cannot load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, file = directory.model_type, directory.path / "config.json"
    if kind not in CONFIG_MAPPING_NAMES:
        return _translated(directory, __version__)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{file}: {kind} is not a causal language model in transformers {__version__}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory.path, dtype="auto", trust_remote_code=False, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(
            directory.path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:240]
        raise UserError(f"{directory}: transformers cannot load it ({reason})") from error
    first = before(tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a"))  # of every text
    context = _context(model.config)
    if context is None:
        context = _UNBOUNDED
        notice(f"{file}: gives no context length; prompts are limited to {context} tokens")
    return model, lambda text: [*first, *tokenizer.encode(text, add_special_tokens=False)], context


def _translated(directory: ModelDirectory, version: str) -> tuple[Any, Encode, int]:
    from xverse.formats.foreign import load_foreign
    from xverse.formats.foreign.families import FAMILIES as TRANSLATED

    kind = directory.model_type
    if kind in FAMILIES:
        from xverse.hf import XverseForCausalLM

        model = XverseForCausalLM.of(load_model(directory), {})
        tokenizer, context = directory.tokenizer, directory.config.context_length
        return model, lambda text: [*tokenizer.prefix_ids, *tokenizer.encode(text)], context
    if kind not in TRANSLATED:
        raise UserError(
            f"{directory.path / 'config.json'}: model_type {kind!r} is not in transformers {version}, and "
            "code in a model's directory is not run"
        )
    foreign = load_foreign(directory)
    first, encode = foreign.tokenizer.bos_ids, foreign.tokenizer.encode
    return foreign.model, lambda text: [*first, *encode(text)], _context(foreign.model.config) or _UNBOUNDED


def _context(config: Any) -> int | None:
    """The context length, for which configurations have several names."""
    for part in (config, config.get_text_config()):
        for name in _POSITIONS:
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    return None
