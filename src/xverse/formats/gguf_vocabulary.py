"""A tokenizer as the metadata of a GGUF file: the inverse of ``gguf_tokenizer.py``."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xverse.config import UserError
from xverse.formats.gguf_tokenizer import split_name
from xverse.formats.spm import TokenType, Vocabulary, spm_vocabulary
from xverse.model import XverseConfig
from xverse.tokenizer import CHAT_TEMPLATE
from xverse.tokenizer.general import GeneralTokenizer
from xverse.tokenizer.tokenizer import SPACE

if TYPE_CHECKING:
    import gguf

    from xverse.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary_of(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokens by id, padded with unused ones to the model's ``size``. Byte-level tokenizers have merges
    instead of scores. Raises UserError for a tokenizer that GGUF cannot describe."""
    if not isinstance(tokenizer, GeneralTokenizer):
        return spm_vocabulary(tokenizer, size)
    model = tokenizer.values["model"]
    if model.get("type") == "Unigram":
        _normalization(tokenizer)
    if tokenizer.prefix_ids not in ((), (tokenizer.bos_id,)):
        raise UserError("GGUF: a text may begin with one token at most, the beginning of text")
    if is_byte_level(tokenizer):
        split_name(tokenizer.values)
    added = {token["id"]: token for token in tokenizer.values.get("added_tokens") or []}
    pieces = model["vocab"]
    unigram = isinstance(pieces, list)
    texts = dict(enumerate(piece for piece, _ in pieces)) if unigram else {i: t for t, i in pieces.items()}
    texts |= {index: token["content"] for index, token in added.items()}
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(size)]
    kinds = [TokenType.NORMAL if index in texts else TokenType.UNUSED for index in range(size)]
    for index, text in enumerate(tokens):
        if index in added:
            kinds[index] = TokenType.CONTROL if added[index].get("special") else TokenType.USER_DEFINED
        elif model.get("byte_fallback") and _BYTE_PIECE.fullmatch(text):
            kinds[index] = TokenType.BYTE
    unknown = model.get("unk_id") if unigram else tokenizer.unk_id
    if not is_byte_level(tokenizer) and unknown is not None and unknown >= 0:
        kinds[unknown] = TokenType.UNKNOWN
    if unigram:
        scores = [score for _, score in pieces] + [0.0] * (size - len(pieces))
    else:
        scores = [0.0] * size if is_byte_level(tokenizer) else _scores(model, tokens, kinds)
    return Vocabulary(tokens, scores, kinds)


def _normalization(tokenizer: GeneralTokenizer) -> tuple[bytes, bool]:
    """Of a unigram tokenizer sentencepiece's compiled normalisation, and whether runs of spaces become one.
    Raises UserError for other steps, which GGUF cannot describe."""
    stored = tokenizer.values.get("normalizer") or {}
    steps = stored.get("normalizers", [stored] if stored else [])
    charsmap, squeezed = b"", False
    for step in steps:
        kind, text = step.get("type"), json.dumps(step, ensure_ascii=False)
        if kind == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif kind == "Replace" and " {2,}" in text:
            squeezed = True
        elif not (kind == "Strip" or (kind in ("Prepend", "Replace") and SPACE in text)):
            raise UserError(f"GGUF: a unigram tokenizer with the normalisation {kind} cannot be written")
    return charsmap, squeezed


def _scores(model: Mapping[str, Any], tokens: list[str], kinds: list[TokenType]) -> list[float]:
    """Minus the rank of the first merge that makes a token, by which sentencepiece merges it at the same
    time; tokens that no merge makes come last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    last = len(ranks) + len(model["merges"])
    scored = (TokenType.NORMAL, TokenType.USER_DEFINED)
    return [
        -float(ranks.get(token, last)) if kind in scored else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def is_byte_level(tokenizer: GeneralTokenizer) -> bool:
    """Whether bytes, not characters, are merged."""
    return '"ByteLevel"' in json.dumps(
        [tokenizer.values.get("pre_tokenizer"), tokenizer.values.get("decoder")]
    )


def add_tokenizer(
    writer: gguf.GGUFWriter,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    config: XverseConfig,
    generation_config: Mapping[str, Any],
) -> None:
    """Add the metadata ``tokenizer.*``."""
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if isinstance(tokenizer, GeneralTokenizer):
        _add_general(writer, vocabulary, tokenizer, config, generation_config)
        return
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(vocabulary.scores)
    writer.add_unk_token_id(0)
    eos = config.eos_token_id
    _add_ids(writer, pad=config.pad_token_id, bos=config.bos_token_id, eos=eos, eot=eos)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_general(
    writer: gguf.GGUFWriter,
    vocabulary: Vocabulary,
    tokenizer: GeneralTokenizer,
    config: XverseConfig,
    generation_config: Mapping[str, Any],
) -> None:
    if is_byte_level(tokenizer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(tokenizer.values))
        merges = tokenizer.values["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    else:
        unigram = tokenizer.values["model"]["type"] == "Unigram"
        charsmap, squeezed = _normalization(tokenizer) if unigram else (b"", False)
        writer.add_tokenizer_model("t5" if unigram else "llama")  # the kinds that llama.cpp calls SPM and UGM
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(has_space_prefix(tokenizer))
        writer.add_remove_extra_whitespaces(squeezed)
        if charsmap:
            writer.add_precompiled_charsmap(charsmap)
    stored = generation_config.get("eos_token_id")
    ends = [index for index in (stored if isinstance(stored, list) else [stored]) if isinstance(index, int)]
    eos = tokenizer.eos_id if tokenizer.eos_id >= 0 else next(iter(ends), config.eos_token_id)
    others = [index for index in dict.fromkeys([*ends, *tokenizer.stop_ids]) if index != eos]
    _add_ids(writer, unk=tokenizer.unk_id, pad=tokenizer.pad_id, bos=tokenizer.bos_id, eos=eos)
    _add_ids(writer, **dict(zip(("eot", "eom"), others, strict=False)))
    writer.add_add_bos_token(bool(tokenizer.prefix_ids))
    writer.add_add_eos_token(False)
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template)


def _add_ids(writer: gguf.GGUFWriter, **ids: int | None) -> None:
    """Add the ids of special tokens by their names in GGUF, except those that do not exist."""
    for name, index in ids.items():
        if index is not None and index >= 0:
            getattr(writer, f"add_{name}_token_id")(index)


def has_space_prefix(tokenizer: GeneralTokenizer) -> bool:
    """Whether sentencepiece's space precedes a text."""
    pieces = tokenizer.backend.encode("a", add_special_tokens=False).tokens
    return bool(pieces) and pieces[0].startswith(SPACE)
