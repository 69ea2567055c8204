"""Tokenizers of other models, from ``tokenizer.json`` or sentencepiece's ``tokenizer.model``.

This module holds what the families' Python tokenizers add to the sentencepiece file: whether a prompt begins
with ``<s>``, and ChatGLM2's five special tokens after the vocabulary (``tokenization_chatglm.py`` of
THUDM/chatglm2-6b). Prepended spaces, normalisation and byte fallback are settings in the file.
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

# Other families may have either file. ChatGLM2's special tokens are in neither.
_FILES = {"falcon": ("tokenizer.json",), "chatglm2": ("tokenizer.model",)}
_CHATGLM_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
# The default for tokenizer_config.json. Baichuan's class would add <s>, but its published configs do not.
_ADDS_BOS = {"internlm": True}


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


def load_foreign_tokenizer(path: str | Path, family: str) -> ForeignTokenizer:
    """The tokenizer of a published directory of ``family``.

    Raises UserError for a directory without one, a file that cannot be read, a tokenizer without an end
    token, and a sentencepiece file if the package is not installed.
    """
    path = Path(path)
    settings = path / "tokenizer_config.json"
    values = read_object(settings) if settings.exists() else {}
    names = _FILES.get(family, ("tokenizer.json", "tokenizer.model"))
    for name in names:
        if (path / name).is_file():
            read = _from_json if name == "tokenizer.json" else _from_sentencepiece
            return read(path / name, values, family)
    raise UserError(f"{path}: has no {' and no '.join(names)}; copy it from the model's published directory")


def _adds_bos(values: dict[str, Any], family: str) -> bool:
    value = values.get("add_bos_token")
    return _ADDS_BOS.get(family, False) if value is None else bool(value)


def _from_json(file: Path, values: dict[str, Any], family: str) -> ForeignTokenizer:
    stored = read_object(file)
    added = stored.get("added_tokens") or []
    plain = {**stored, "added_tokens": [token for token in added if not token.get("special")]}
    backend, encoder = _build(stored, file), _build(plain, file)
    encoder.no_truncation()  # the file may set either
    encoder.no_padding()

    def special(key: str, default: str) -> int | None:
        value = values.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return backend.token_to_id(text or default)

    falcon = family == "falcon"
    eos, bos = special("eos_token", "<|endoftext|>" if falcon else "</s>"), special("bos_token", "<s>")
    if eos is None:
        raise UserError(f"{file}: has no end-of-text token")
    with_bos = not falcon and _adds_bos(values, family)
    if with_bos and bos is None:
        raise UserError(f"{file}: has no beginning-of-text token")
    return ForeignTokenizer(
        encode=lambda text: encoder.encode(text, add_special_tokens=False).ids,
        bos_ids=(bos,) if with_bos and bos is not None else (),
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


def _from_sentencepiece(file: Path, values: dict[str, Any], family: str) -> ForeignTokenizer:
    sentencepiece = need("sentencepiece", "eval", str(file))
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    size = processor.get_piece_size()
    special = {}
    if family == "chatglm2":
        special = {token: size + index for index, token in enumerate(_CHATGLM_SPECIAL)}
    # Old configs have wrong ids (the first Llama conversions 0 and 1); the file's are right.
    bos, eos = processor.bos_id(), processor.eos_id()
    if eos < 0:
        raise UserError(f"{file}: has no end-of-text token")
    bos_ids: tuple[int, ...] = ()
    if special:
        bos_ids = (special["[gMASK]"], special["sop"])
    elif _adds_bos(values, family):
        if bos < 0:
            raise UserError(f"{file}: has no beginning-of-text token")
        bos_ids = (bos,)
    return ForeignTokenizer(processor.encode, bos_ids, eos, size + len(special))
