"""Vocabularies of any publisher, each read with its library, for comparison in reports.

tokenizers reads a directory or a ``tokenizer.json``; tiktoken a ``.tiktoken``, or a ``.model`` with lines
``base64 rank``; sentencepiece its ``.model``, and a ``.gguf`` with a vocabulary of its kind. A tiktoken file
does not tell how text is split first: Qwen's is recognised by its 151,643 ranks, others are split as in
Llama 3 and cl100k.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.config import UserError, need
from xverse.tokenizer.general import byte_table
from xverse.tokenizer.repair import read_tokenizer_json
from xverse.tokenizer.tokenizer import Tokenizer, build_backend

# As Llama 3 (tokenizer.py), Qwen (tokenization_qwen.py) and tiktoken's cl100k_base publish them.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_RANKS = 151_643
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class ComparedVocabulary:
    """``encode``: the ids of many texts, without special tokens; ``pieces``: ids that encode only a part of a
    character (byte fallback).
    """

    name: str
    size: int
    encode: Callable[[Sequence[str]], list[list[int]]]
    pieces: frozenset[int]
    decode: Callable[[Sequence[int]], str] | None = None  # None: the round trip is not checked


def load_vocabulary(path: str | Path) -> ComparedVocabulary:
    """Read a vocabulary. Raises UserError if the file or its library is missing, or its kind is unknown."""
    path = Path(path)
    name, _, rest = str(path).partition("=")
    if rest and not path.exists():
        path = Path(rest)
    else:
        name = path.name if path.name != "tokenizer.json" else path.absolute().parent.name
    if path.is_dir() or path.suffix == ".json":
        return _from_json(name, path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"GGUF"):
        return _from_gguf(name, path)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head):
        return _from_tiktoken(name, path)
    if path.suffix == ".model":
        return _from_sentencepiece(name, path, path.read_bytes())
    raise UserError(f"{path}: not a vocabulary (tokenizer.json, .tiktoken, sentencepiece's .model or .gguf)")


def _from_json(name: str, path: Path) -> ComparedVocabulary:
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        ours = Tokenizer.load(file)
    except UserError:
        return _from_other_json(name, file)
    return ComparedVocabulary(name, ours.vocab_size, ours.encode_batch, ours.byte_ids, ours.decode)


def _from_other_json(name: str, file: Path) -> ComparedVocabulary:
    values = read_tokenizer_json(file)
    values["added_tokens"] = [token for token in values.get("added_tokens") or [] if not token.get("special")]
    backend = build_backend(values, str(file))
    vocab = backend.get_vocab()
    byte_level = "ByteLevel" in json.dumps(values.get("pre_tokenizer")) + json.dumps(values.get("decoder"))
    if byte_level:
        table = byte_table()
        raw = {i: bytes(table.get(letter, 63) for letter in token) for token, i in vocab.items()}
        pieces = frozenset(i for i, token in raw.items() if not _is_text(token))
    else:
        pieces = frozenset(index for token, index in vocab.items() if _BYTE_PIECE.fullmatch(token))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    return ComparedVocabulary(name, len(vocab), encode, pieces)


def _from_tiktoken(name: str, path: Path) -> ComparedVocabulary:
    tiktoken = need("tiktoken", "eval", str(path))
    import base64

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path}: line {number} is not a token in base64 and its rank") from None
    digits = "" if len(ranks) == _QWEN_RANKS else "{1,3}"
    encoding = tiktoken.Encoding(
        name, pat_str=_SPLIT.format(digits=digits), mergeable_ranks=ranks, special_tokens={}
    )

    def encode(texts: Sequence[str]) -> list[list[int]]:
        if len(ranks) == _QWEN_RANKS:  # Qwen's tokenizer normalises first
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        return encoding.encode_ordinary_batch(list(texts), num_threads=2)

    return ComparedVocabulary(
        name, len(ranks), encode, frozenset(i for token, i in ranks.items() if not _is_text(token))
    )


def _from_sentencepiece(name: str, path: Path, proto: bytes) -> ComparedVocabulary:
    package = need("sentencepiece", "eval", str(path))
    try:
        processor = package.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    size = processor.get_piece_size()
    if not size:
        raise UserError(f"{path}: is empty")
    pieces = frozenset(
        index for index in range(size) if processor.is_byte(index) or processor.is_unknown(index)
    )
    return ComparedVocabulary(name, size, lambda texts: processor.encode(list(texts)), pieces)


def _from_gguf(name: str, path: Path) -> ComparedVocabulary:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path}: cannot be read as GGUF ({error})") from None

    def value(key: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    if value("model") != "llama":
        raise UserError(f"{path}: unsupported vocabulary '{value('model')}'; only sentencepiece's is read")
    schema = need("sentencepiece.sentencepiece_model_pb2", "eval", str(path))
    model = schema.ModelProto()
    kinds = value("token_type")
    for token, score, kind in zip(value("tokens"), value("scores"), kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = schema.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = 6 in kinds  # type 6: one byte
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(value("add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    return _from_sentencepiece(name, path, model.SerializeToString())


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
