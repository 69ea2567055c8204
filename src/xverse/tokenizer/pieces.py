"""Sentencepiece's vocabularies, of its ``tokenizer.model`` or a GGUF file, as a tokenizer.json has them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xverse.config import UserError, need
from xverse.tokenizer.tokenizer import SPACE

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(2, 7)  # types of pieces, in GGUF too
PREFIXED = "Prepend"  # the normalisation that "always" puts a space before a text
_UNIGRAM = 1  # trainer_spec.model_type


def read_model_file(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mappings of tokenizer.json and, as far as the file determines it, tokenizer_config.json. Raises
    UserError for a file that cannot be read or has another kind of vocabulary."""
    schema = need("sentencepiece.sentencepiece_model_pb2", "eval", str(file))
    model = schema.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
        assert model.pieces
    except Exception as error:  # protobuf's, which is not a dependency of its own
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    tokens, kinds = [piece.piece for piece in model.pieces], [piece.type for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, schema.TrainerSpec.BPE):
        raise UserError(f"{file}: sentencepiece's kinds other than BPE and unigram are not supported")
    values = values_of(
        tokens,
        scores,
        kinds,
        unigram=trainer.model_type == _UNIGRAM,
        prefix="always" if normalizer.add_dummy_prefix else "never",
        charsmap=normalizer.precompiled_charsmap,
        squeezed=normalizer.remove_extra_whitespaces,
    )
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id, "unk": trainer.unk_id}
    settings = {f"{name}_token": tokens[index] for name, index in ids.items() if 0 <= index < len(tokens)}
    return values, {**settings, "add_bos_token": "bos_token" in settings}


def values_of(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    unigram: bool,
    prefix: str,
    charsmap: bytes = b"",
    squeezed: bool = False,
) -> dict[str, Any]:
    """A tokenizer.json of pieces with their ``scores`` and types. ``prefix``: where a space is put,
    "never", "first" (before a text that does not begin with one) or "always" (before every part between
    special tokens, as slow tokenizers of transformers do). ``charsmap`` is sentencepiece's
    compiled normalisation; ``squeezed``: runs of spaces become one."""
    vocab = {token: index for index, token in enumerate(tokens) if kinds[index] != UNUSED}
    steps: list[dict[str, Any]] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if squeezed:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prefix == "always":
        steps.append({"type": "Prepend", "prepend": SPACE})
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    model: dict[str, Any]
    if unigram:
        unknown = next((index for index, kind in enumerate(kinds) if kind == UNKNOWN), None)
        pieces = [[token, score] for token, score in zip(tokens, scores, strict=True)]
        model = {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": BYTE in kinds}
    else:
        plain = {token: index for token, index in vocab.items() if kinds[index] not in (UNKNOWN, CONTROL)}
        model = bpe_model(vocab, merges_of(plain, scores), byte_fallback=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(tokens, kinds),
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": None if prefix == "always" else metaspace(prefix),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix != "never" else []),
            ],
        },
        "model": model,
    }


def metaspace(scheme: str) -> dict[str, Any]:
    """A pre-tokenizer that writes spaces as sentencepiece does; ``scheme`` as ``prefix`` of ``values_of``."""
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def added_tokens(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """The entries of control and user-defined tokens."""
    return [
        added_token(index, tokens[index], kind == CONTROL)
        for index, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED)
    ]


def added_token(index: int, text: str, special: bool) -> dict[str, Any]:
    """One entry of ``added_tokens``."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, "special": special, **flags}


def merges_of(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs that make an entry, the entry with the best score first, as sentencepiece merges."""
    merges: list[tuple[float, int, str, str]] = []
    for piece, index in vocab.items():
        for at in range(1, len(piece)):
            if piece[:at] in vocab and piece[at:] in vocab:
                merges.append((-scores[index], at, piece[:at], piece[at:]))
    return [(left, right) for _, _, left, right in sorted(merges)]


def bpe_model(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]], *, byte_fallback: bool
) -> dict[str, Any]:
    """The ``model`` of a tokenizer.json, with the ``merges`` that it can use."""
    known = [
        list(pair) for pair in merges if pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab
    ]
    return {
        "type": "BPE", "dropout": None, "unk_token": "<unk>" if "<unk>" in vocab else None,
        "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
        "byte_fallback": byte_fallback, "ignore_merges": False, "vocab": dict(vocab), "merges": known,
    }  # fmt: skip
