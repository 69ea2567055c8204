"""The tokenizer in a GGUF file's metadata, as a tokenizer.json has it.

``gpt2`` is byte-level BPE with merges; the file names its split of words (``tokenizer.ggml.pre``). ``llama``
is sentencepiece's BPE, whose merges follow from the scores. XVERSE's is recognised by its special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xverse.config import UserError
from xverse.tokenizer.general import GeneralTokenizer
from xverse.tokenizer.tokenizer import SPACE, SPECIAL_TOKENS, Tokenizer

_CONTROL, _USER, _UNUSED = 3, 4, 5  # token types
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
    used = {token: index for token, index in vocab.items() if kinds[index] != _UNUSED}
    added = [
        {
            "id": index, "content": tokens[index], "special": kind == _CONTROL, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False,
        }
        for index, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER)
    ]  # fmt: skip
    if model == "gpt2":
        values = _byte_level(used, metadata, where)
    elif model == "llama":
        scores = metadata.get("tokenizer.ggml.scores") or []
        if len(scores) != len(tokens):
            raise UserError(
                f"{where}: its tokenizer has {len(scores)} scores for {len(tokens)} tokens, so that texts "
                "cannot be split as in training; give the model's published tokenizer with --tokenizer DIR"
            )
        merges = _merges(vocab, scores)
        if tokens[1:4] == list(SPECIAL_TOKENS[1:]):
            from xverse.tokenizer.train import tokenizer_values

            return Tokenizer(tokenizer_values(vocab, merges), where)
        values = _sentencepiece(used, merges, metadata)
    else:
        raise UserError(f"{where}: tokenizer {model!r} is not supported, only gpt2 and llama")
    values = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **values}
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
        "model": {**_bpe(vocab, pairs, byte_fallback=False), "ignore_merges": split in _WHOLE_WORDS},
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
    found = [{key: value for key, value in part.items() if key not in offsets} for part in parts or []]
    for name in _known_splits():
        expected = [{k: v for k, v in part.items() if k not in offsets} for part in _parts(name)]
        if found == expected:
            return name
    raise UserError(
        "GGUF: the tokenizer's split of words has no name there that is known here "
        f"(known: {', '.join(_known_splits())})"
    )


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs that make an entry, the entry with the best score first, as sentencepiece merges."""
    merges: list[tuple[float, int, str, str]] = []
    for piece, index in vocab.items():
        for at in range(1, len(piece)):
            if piece[:at] in vocab and piece[at:] in vocab:
                merges.append((-scores[index], at, piece[:at], piece[at:]))
    return [(left, right) for _, _, left, right in sorted(merges)]


def _sentencepiece(
    vocab: Mapping[str, int], merges: list[tuple[str, str]], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": _bpe(vocab, merges, byte_fallback=True),
    }


def _bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], *, byte_fallback: bool) -> dict[str, Any]:
    known = [
        list(pair) for pair in merges if pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab
    ]
    return {
        "type": "BPE", "dropout": None, "unk_token": "<unk>" if "<unk>" in vocab else None,
        "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": byte_fallback, "ignore_merges": False, "vocab": dict(vocab), "merges": known,
    }  # fmt: skip
