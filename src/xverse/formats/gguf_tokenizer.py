"""The tokenizer in a GGUF file's metadata, as a tokenizer.json has it.

``gpt2`` is byte-level BPE with merges; the file names its split of words (``tokenizer.ggml.pre``). ``llama``
is sentencepiece's BPE, whose merges follow from the scores, ``t5`` its unigram model. XVERSE's
is recognised by its special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xverse.config import UserError
from xverse.tokenizer.general import GeneralTokenizer
from xverse.tokenizer.pieces import UNUSED, added_tokens, bpe_model, merges_of, values_of
from xverse.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How each ``tokenizer.ggml.pre`` splits a text, before the bytes; "gpt-2" is the library's own split.
_SPLITS: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": [{"Regex": _LETTERS + r"\p{N}{1,3}" + _REST}],
    "llama3": [{"Regex": _LETTERS + r"\p{N}{1,3}" + _REST}],
    "smaug-bpe": [{"Regex": _LETTERS + r"\p{N}{1,3}" + _REST}],
    "qwen2": [{"Regex": _LETTERS + r"\p{N}" + _REST}],
}
_GPT2 = ("gpt-2", "default")
_NFC = ("qwen2",)  # which normalise a text first
_WHOLE_WORDS = ("llama-bpe", "llama3", "smaug-bpe")  # in which a word that is a token is not merged
_GPT2_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises UserError for a kind that is not supported or does not fit."""
    model, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{where}: holds no tokenizer")
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise UserError(f"{where}: {len(kinds)} token types for {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if model == "gpt2":
        used = {token: index for token, index in vocab.items() if kinds[index] != UNUSED}
        values = {"added_tokens": added_tokens(tokens, kinds), **_byte_level(used, metadata, where)}
    elif model in ("llama", "t5"):
        scores = metadata.get("tokenizer.ggml.scores") or []
        if len(scores) != len(tokens):
            raise UserError(
                f"{where}: its tokenizer has {len(scores)} scores for {len(tokens)} tokens, so that texts "
                "cannot be split as in training; give the model's published tokenizer with --tokenizer DIR"
            )
        if tokens[1:4] == list(SPECIAL_TOKENS[1:]):
            from xverse.tokenizer.train import tokenizer_values

            return Tokenizer(tokenizer_values(vocab, merges_of(vocab, scores)), where)
        values = values_of(
            tokens,
            scores,
            kinds,
            unigram=model == "t5",
            prefix="first" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never",
            charsmap=bytes(metadata.get("tokenizer.ggml.precompiled_charsmap") or b""),
            squeezed=model == "t5" and bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces")),
        )
    else:
        raise UserError(f"{where}: tokenizer {model!r} is not supported, only gpt2, llama and t5")
    values = {"version": "1.0", "truncation": None, "padding": None, **values}
    settings = {
        f"{name}_token": tokens[index]
        for name in ("bos", "eos", "unknown", "padding")
        if isinstance(index := metadata.get(f"tokenizer.ggml.{name}_token_id"), int)
        and 0 <= index < len(tokens)
    }
    settings = {
        {"unknown_token": "unk_token", "padding_token": "pad_token"}.get(k, k): v for k, v in settings.items()
    }
    begins = metadata.get("tokenizer.ggml.add_bos_token")
    settings["add_bos_token"] = model == "llama" if begins is None else bool(begins)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return GeneralTokenizer(values, settings, template if isinstance(template, str) else None, where)


def _byte_level(vocab: Mapping[str, int], metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    merges, split = metadata.get("tokenizer.ggml.merges") or [], metadata.get("tokenizer.ggml.pre", "default")
    if split not in _known_splits():
        raise UserError(
            f"{where}: tokenizer.ggml.pre {split!r} is not supported "
            f"(supported: {', '.join(_known_splits())})"
        )
    pairs = [merge.split(" ", 1) for merge in merges if isinstance(merge, str) and " " in merge]
    return {
        "normalizer": {"type": "NFC"} if split in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _parts(split)},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {**bpe_model(vocab, pairs, byte_fallback=False), "ignore_merges": split in _WHOLE_WORDS},
    }


def _known_splits() -> tuple[str, ...]:
    return (*_SPLITS, *_GPT2, *_GPT2_SINGLE_DIGITS)


def _parts(split: str) -> list[dict[str, Any]]:
    """The pre-tokenizers of a ``tokenizer.ggml.pre``."""
    parts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        for pattern in _SPLITS.get(split, ())
    ]
    if split in _GPT2_SINGLE_DIGITS:
        parts.append({"type": "Digits", "individual_digits": True})
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return [*parts, {**last, "use_regex": split not in _SPLITS}]


def split_name(values: Mapping[str, Any]) -> str:
    """The ``tokenizer.ggml.pre`` of a byte-level tokenizer.json. Raises UserError for one without a name."""
    stored = values.get("pre_tokenizer") or {}
    parts = stored.get("pretokenizers") if stored.get("type") == "Sequence" else [stored]
    offsets = ("trim_offsets",)  # which do not change ids
    steps = [{key: value for key, value in part.items() if key not in offsets} for part in parts or []]
    for name in _known_splits():
        expected = [{k: v for k, v in part.items() if k not in offsets} for part in _parts(name)]
        if steps == expected:
            return name
    raise UserError(
        "GGUF: the tokenizer's split of words has no name there that is known here "
        f"(known: {', '.join(_known_splits())})"
    )
