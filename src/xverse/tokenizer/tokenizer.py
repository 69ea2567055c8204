"""The tokenizer: lossless conversion between text and ids.

The ``tokenizers`` library encodes single texts, compiled code many at once (encoder.py). Decoding joins the
bytes of the tokens and decodes them as UTF-8, so that a stream can hold back an unfinished character and its
pieces always add up to the full text.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from xverse.config import UserError
from xverse.files import write_json
from xverse.tokenizer.chat_template import CHAT_TEMPLATE
from xverse.tokenizer.encoder import SPACE, Encoder, make_encoder
from xverse.tokenizer.repair import read_tokenizer_json, repair_json

SPECIAL_TOKENS = ("<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>")  # ids 0 to 3
_LONG = 16_384  # characters from which a text is encoded by compiled code, which lets other threads run
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A BPE tokenizer of XVERSE's structure.

    ``backend`` is the ``tokenizers.Tokenizer`` as other libraries load it. ``encode`` differs from it in two
    ways, both for safety: the text of a special token stays text (unless ``allow_special``), and a literal
    ``▁`` stays a ``▁`` (the backend reads it as a space).
    """

    unk_id, pad_id, bos_id, eos_id = 0, 1, 2, 3
    prefix_ids: tuple[int, ...] = ()  # of every text that is not a conversation
    template: str | None = None  # a chat format other than XVERSE's
    stop_ids: tuple[int, ...] = ()  # what else ends a reply in that format
    bos_apart = False

    def __init__(self, values: dict[str, Any], where: str = "tokenizer.json") -> None:
        """``values`` is the mapping of a tokenizer.json, repaired or not; ``where`` names it in errors.

        Raises UserError unless it is a BPE tokenizer of XVERSE's structure.
        """
        self.values = repair_json(values)
        _check(self.values, where)
        # User text must not become special ids, so plain encoding has no special tokens at all.
        added = self.values.get("added_tokens") or []
        plain = {**self.values, "added_tokens": [token for token in added if not token.get("special")]}
        self._plain = build_backend(plain, where)
        self.special_ids = frozenset(token["id"] for token in added if token.get("special")) | {0, 1, 2, 3}
        vocab = {**self.values["model"]["vocab"], **{token["content"]: token["id"] for token in added}}
        self.vocab_size: int = len(vocab)
        self._added_ids = frozenset(token["id"] for token in added)
        self._bytes: list[bytes] = [b""] * (max(vocab.values()) + 1)
        for text, index in vocab.items():
            self._bytes[index] = token_bytes(text, literal=index in self._added_ids)
        self.byte_ids = frozenset(
            index
            for text, index in vocab.items()
            if index not in self._added_ids and _BYTE_TOKEN.fullmatch(text)
        )
        space_ids = [vocab.get(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_character_ids: list[int] = [index for index in space_ids if index is not None]

    @functools.cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer with the special tokens. Built on first use: with 100,534 entries this
        takes a fifth of a second, and chat does not need it."""
        return build_backend(self.values, "tokenizer.json")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load from a model directory or a tokenizer.json; upstream's broken files are repaired in memory."""
        path = Path(path)
        if path.is_dir():
            if not (path / "tokenizer.json").exists():
                raise UserError(f"{path}: no tokenizer.json in this directory")
            path = path / "tokenizer.json"
        return cls(read_tokenizer_json(path), str(path))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[dict[str, Any]]]:
        return Tokenizer, (self.values,)

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 (hex) of everything that the ids depend on; not of the formatting."""
        return hashlib.sha256(_canonical(self.values)).hexdigest()

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of ``text``, without BOS or EOS. ``decode(encode(text)) == text`` for any Unicode text.

        ``<|endoftext|>`` and other special tokens in the text are ordinary characters unless
        ``allow_special``, so that typing one does not end a turn. Upstream, through PreTrainedTokenizerFast,
        always maps them to ids. Surrogates are replaced as by ``replace_surrogates``.
        """
        if len(text) > _LONG and not allow_special and self._encoder is not None:
            return self.encode_flat([text])[0].tolist()
        text = replace_surrogates(text)
        backend = self.backend if allow_special else self._plain
        if SPACE not in text or not self._space_character_ids:
            return backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids += self._space_character_ids
            if part:
                ids += backend.encode(part, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[encode(text) for text in texts]``, in parallel threads."""
        if self._encoder is not None:
            flat, lengths = self.encode_flat(texts)
            ids, ends = flat.tolist(), np.cumsum(lengths).tolist()
            return [ids[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
        plain = [index for index, text in enumerate(texts) if SPACE not in text]
        clean = [replace_surrogates(texts[index]) for index in plain]
        encodings = self._plain.encode_batch_fast(clean, add_special_tokens=False)
        result: list[list[int]] = [[] for _ in texts]
        for index, encoding in zip(plain, encodings, strict=True):
            result[index] = encoding.ids
        for index, text in enumerate(texts):
            if SPACE in text:
                result[index] = self.encode(text)
        return result

    def encode_flat(
        self, texts: Sequence[str], last: int | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The concatenated ids of texts, uint32 [ids], and the number of each text's ids, int64 [texts].

        ``last`` is appended to each text, and other families' ``prefix_ids`` are put before it. Runs in
        parallel threads, without a Python object for each id.
        """
        if self._encoder is not None:
            return self._encoder.encode([replace_surrogates(text).encode() for text in texts], last)
        rows = self.encode_batch(texts)
        if last is not None:  # whole documents
            rows = [[*self.prefix_ids, *ids, last] for ids in rows]
        lengths = np.array([len(ids) for ids in rows], np.int64)
        return np.fromiter(itertools.chain.from_iterable(rows), np.uint32, int(lengths.sum())), lengths

    @functools.cached_property
    def _encoder(self) -> Encoder | None:
        return make_encoder(self.values)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for. Raises UserError for an id outside the vocabulary."""
        if not 0 <= token_id < len(self._bytes):
            raise UserError(f"token id {token_id} is outside the vocabulary (0 to {len(self._bytes) - 1})")
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``, with special tokens skipped or shown. Invalid UTF-8 becomes U+FFFD."""
        parts = [self.token_bytes(index) for index in ids if not (skip_special and index in self.special_ids)]
        return b"".join(parts).decode("utf-8", errors="replace")

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids one by one."""
        return StreamDecoder(self, skip_special)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json (repaired) and tokenizer_config.json, so that stock transformers loads it."""
        directory = Path(directory)
        write_json(directory / "tokenizer.json", self.values)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": self.backend.id_to_token(self.unk_id),
            "pad_token": SPECIAL_TOKENS[1],
            "bos_token": SPECIAL_TOKENS[2],
            "eos_token": SPECIAL_TOKENS[3],
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": CHAT_TEMPLATE,
        }
        write_json(directory / "tokenizer_config.json", config)


class StreamDecoder:
    """Decodes ids one by one; the texts from ``push`` and ``finish`` add up to the full decode."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, strip_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = strip_space  # one before the text
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is complete now; empty while a character is unfinished."""
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        if self._strip_space and text:
            self._strip_space = False
            text = text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """The rest: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)


def is_xverse(values: dict[str, Any]) -> bool:
    """Whether the mapping of a tokenizer.json, repaired or not, has XVERSE's structure."""
    try:
        _check(values, "")
    except UserError:
        return False
    return True


def _check(values: dict[str, Any], where: str) -> None:
    model = values.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(vocab, dict):
        kind = model.get("type") if isinstance(model, dict) else None
        problem = f"a {kind} tokenizer" if kind and kind != "BPE" else "no BPE model"
        raise UserError(f"{where}: not a BPE tokenizer of XVERSE's structure (found {problem})")
    if "Metaspace" not in json.dumps(values.get("pre_tokenizer")):
        raise UserError(f"{where}: not a BPE tokenizer of XVERSE's structure (no Metaspace pre-tokenizer)")
    added = values.get("added_tokens") or []
    if not isinstance(added, list) or any(
        not isinstance(token, dict)
        or not isinstance(token.get("id"), int)
        or not isinstance(token.get("content"), str)
        for token in added
    ):
        raise UserError(f"{where}: added_tokens must be a list of tokens with id and content")
    ids = {**vocab, **{token["content"]: token["id"] for token in added}}
    for index, name in enumerate(SPECIAL_TOKENS[1:], start=1):
        if ids.get(name) != index:
            problem = f"it has id {ids[name]}" if name in ids else "it is missing"
            raise UserError(f"{where}: the special token {name} must have id {index}, but {problem}")


def build_backend(values: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(values, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: not a usable tokenizer.json ({' '.join(str(error).split())})") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def token_bytes(text: str, literal: bool, table: Mapping[str, int] | None = None) -> bytes:
    """The bytes of a vocabulary entry. ``literal``: an added token, which is text. ``table``: the bytes of a
    byte-level vocabulary's characters."""
    if literal:
        return text.encode()
    if table is not None:
        return bytes(table[character] for character in text if character in table)
    byte = _BYTE_TOKEN.fullmatch(text)
    return bytes.fromhex(byte.group(1)) if byte else text.replace(SPACE, " ").encode()


def replace_surrogates(text: str) -> str:
    """Surrogate pairs as the characters that they encode, lone surrogates as U+FFFD; other text unchanged."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _canonical(values: dict[str, Any]) -> bytes:
    model = values["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    added = [
        {
            key: token.get(key, False)
            for key in ("id", "content", "special", "lstrip", "rstrip", "single_word")
        }
        for token in values.get("added_tokens") or []
    ]
    core = {
        "vocab": model["vocab"],
        "merges": merges,
        "byte_fallback": bool(model.get("byte_fallback")),
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": values.get("normalizer"),
        "pre_tokenizer": _canonical_part(values.get("pre_tokenizer")),
    }
    return json.dumps(core, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _canonical_part(part: Any) -> Any:
    if isinstance(part, list):
        return [_canonical_part(item) for item in part]
    if not isinstance(part, dict):
        return part
    part = {key: _canonical_part(value) for key, value in part.items()}
    if part.get("type") == "Metaspace":  # libraries may omit its defaults
        part.pop("add_prefix_space", None)
        part.pop("str_rep", None)
        part.setdefault("split", True)
    return part
