"""Tokenizers of ChatGLM2 (sentencepiece's ``tokenizer.model``) and Falcon (``tokenizer.json``).

ChatGLM2's five special tokens follow its vocabulary (``tokenization_chatglm.py`` of THUDM/chatglm2-6b);
prepended spaces, normalisation and byte fallback are settings in its file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from xverse.config import UserError, need
from xverse.texts import read_object

_CHATGLM_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


@dataclass(frozen=True)
class ForeignTokenizer:
    """Text to ids, with one interface for every family.

    ``encode(text)`` adds no special tokens and, for tokenizer.json, recognises none in the text. ``bos_ids``
    precede every text that the family evaluates; ``eos_id`` ends one.
    """

    encode: Callable[[str], list[int]]
    bos_ids: tuple[int, ...]
    eos_id: int
    vocab_size: int


def load_foreign_tokenizer(path: str | Path, model_type: str) -> ForeignTokenizer:
    """The tokenizer of a published directory.

    Raises UserError for a directory without one, a file that cannot be read, a tokenizer without an end
    token, and a sentencepiece file if the package is not installed.
    """
    chatglm = model_type == "chatglm"
    file = Path(path) / ("tokenizer.model" if chatglm else "tokenizer.json")
    if not file.is_file():
        raise UserError(f"{path}: has no {file.name}; copy it from the model's published directory")
    return _chatglm(file) if chatglm else _falcon(file)


def _falcon(file: Path) -> ForeignTokenizer:
    settings = file.with_name("tokenizer_config.json")
    values = read_object(settings) if settings.exists() else {}
    stored = read_object(file)
    added = stored.get("added_tokens") or []
    plain = {**stored, "added_tokens": [token for token in added if not token.get("special")]}
    backend, encoder = _build(stored, file), _build(plain, file)
    encoder.no_truncation()  # the file may set either
    encoder.no_padding()
    value = values.get("eos_token")
    text = value.get("content") if isinstance(value, dict) else value
    eos = backend.token_to_id(text or "<|endoftext|>")
    if eos is None:
        raise UserError(f"{file}: has no end-of-text token")
    return ForeignTokenizer(
        encode=lambda text: encoder.encode(text, add_special_tokens=False).ids,
        bos_ids=(),
        eos_id=eos,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
    )


def _build(values: dict[str, Any], file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{file}: cannot be read as a tokenizer ({' '.join(str(error).split())[:120]})"
        ) from None


def _chatglm(file: Path) -> ForeignTokenizer:
    sentencepiece = need("sentencepiece", "eval", str(file))
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    size = processor.get_piece_size()
    if processor.eos_id() < 0:
        raise UserError(f"{file}: has no end-of-text token")
    bos_ids = tuple(size + _CHATGLM_SPECIAL.index(token) for token in ("[gMASK]", "sop"))
    return ForeignTokenizer(processor.encode, bos_ids, processor.eos_id(), size + len(_CHATGLM_SPECIAL))
