"""Tokenizers of other models: byte-level BPE, and sentencepiece's BPE or unigram; with their chat templates.

A directory's ``tokenizer.json`` and ``tokenizer_config.json`` are read as transformers reads them. If there
is only sentencepiece's ``tokenizer.model``, it is converted (``pieces.py``).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xverse.config import UserError
from xverse.files import write_text
from xverse.texts import read_object, read_text
from xverse.tokenizer.pieces import read_model_file
from xverse.tokenizer.tokenizer import (
    SPACE,
    StreamDecoder,
    Tokenizer,
    build_backend,
    is_xverse,
    replace_surrogates,
    token_bytes,
)

_TEMPLATE = "chat_template.jinja"
# Keys of tokenizer_config.json that other programs ignore: a token that ends replies besides the end of text,
# and whether the text after the first token begins as a text does, with sentencepiece's space.
STOP_TOKEN, BOS_APART = "stop_token", "bos_apart"


class GeneralTokenizer(Tokenizer):
    """A tokenizer of the Llama family with the interface of ``Tokenizer``.

    ``prefix_ids`` begin every text that is not a conversation, such as ``<s>``; ``template`` is the chat
    template or None. ``bos_id``, ``eos_id``, ``pad_id`` and ``unk_id`` are -1 where there is none.
    """

    _encoder = None  # compiled code knows XVERSE's structure only

    def __init__(
        self, values: dict[str, Any], settings: Mapping[str, Any], template: str | None, where: str
    ) -> None:
        """``values`` and ``settings`` are the mappings of tokenizer.json and tokenizer_config.json.

        Raises UserError for a file that cannot be used or that has another kind of vocabulary.
        """
        self.values, self.settings, self.template = values, dict(settings), template
        self.where = where
        added = values.get("added_tokens") or []
        self.special_ids = frozenset(token["id"] for token in added if token.get("special"))
        plain = [token for token in added if not token.get("special")]
        model = values.get("model") or {}
        kind = model.get("type")
        if kind == "Unigram":  # which would find special tokens in a text by itself
            hidden = {*self.special_ids, model.get("unk_id")}
            vocab_list = [["\ufdd0" if i in hidden else t, s] for i, (t, s) in enumerate(model["vocab"])]
            model = {**model, "vocab": vocab_list}
        parts_of_plain = {**values, "model": model, "added_tokens": plain, "post_processor": None}
        self._plain = build_backend(parts_of_plain, where)
        parts = [values.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        text = json.dumps(parts, ensure_ascii=False)
        byte_level = '"ByteLevel"' in text
        if kind not in ("BPE", "Unigram") or not (byte_level or SPACE in text):
            raise UserError(
                f"{where}: a {kind} tokenizer; byte-level BPE and sentencepiece's two are supported"
            )
        vocab: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        literal = {token["id"] for token in added}
        table = byte_table() if byte_level else None
        self._bytes = [b""] * self.vocab_size
        for piece, index in vocab.items():
            self._bytes[index] = token_bytes(piece, index in literal, table)
        self.byte_ids = frozenset(
            index for index, value in enumerate(self._bytes) if len(value) == 1 and value > b"\x7f"
        )
        first = self.backend.encode("a", add_special_tokens=False).ids
        raw = b"".join(self._bytes[index] for index in first).decode()
        self._strips_space = raw != self.backend.decode(first) == "a"
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            self._special(name, vocab) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        self.prefix_ids = self._prefix()
        stop = self._special(STOP_TOKEN, vocab)
        self.stop_ids = (stop,) if stop >= 0 else ()
        self.bos_apart = bool(self.settings.get(BOS_APART))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return GeneralTokenizer, (self.values, self.settings, self.template, self.where)

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 (hex) of everything that the ids depend on."""
        core = {key: self.values.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        return hashlib.sha256(json.dumps(core, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of ``text`` without ``prefix_ids``; special tokens in it are plain text unless
        ``allow_special``."""
        backend = self.backend if allow_special else self._plain
        return backend.encode(replace_surrogates(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``, without the space that sentencepiece puts before a text."""
        text = super().decode(ids, skip_special)
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        return StreamDecoder(self, skip_special, strip_space=self._strips_space)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template as they were read."""
        directory = Path(directory)
        files = {
            "tokenizer.json": json.dumps(self.values, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(self.settings, ensure_ascii=False, indent=2),
        }
        if self.template is not None and "chat_template" not in self.settings:
            files[_TEMPLATE] = self.template
        for name, text in files.items():
            write_text(directory / name, text + ("" if name == _TEMPLATE else "\n"))

    def _special(self, name: str, vocab: Mapping[str, int]) -> int:
        stored = self.settings.get(name)
        text = stored.get("content") if isinstance(stored, Mapping) else stored
        return vocab.get(text, -1) if isinstance(text, str) else -1

    def _prefix(self) -> tuple[int, ...]:
        """What the file's post-processor, or ``add_bos_token``, puts before a text."""
        wanted = self.settings.get("add_bos_token")
        if wanted is not None:
            return (self.bos_id,) if wanted and self.bos_id >= 0 else ()
        plain, whole = (self.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        return tuple(before(plain, whole))


def before(part: list[int], whole: list[int]) -> list[int]:
    """What is in ``whole`` before ``part``; nothing if that is not in it."""
    starts = (start for start in range(len(whole)) if whole[start : start + len(part)] == part)
    return whole[: next(starts, 0)]


def load_tokenizer_of(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, or of a tokenizer.json: XVERSE's where it has that structure,
    otherwise a general one.

    Raises UserError for a directory without a tokenizer and for one that cannot be used.
    """
    directory = Path(directory)
    file = directory / "tokenizer.json"
    if directory.is_file():
        file, directory = directory, directory.parent
    settings_file = directory / "tokenizer_config.json"
    settings = read_object(settings_file) if settings_file.is_file() else {}
    if file.is_file():
        values = read_object(file)
        if is_xverse(values):
            return Tokenizer.load(file)
    elif (directory / "tokenizer.model").is_file():
        values, found = read_model_file(directory / "tokenizer.model")
        settings = {**found, **{k: v for k, v in settings.items() if v not in (None, "")}}
    else:
        raise UserError(
            f"{directory}: has no tokenizer.json and no tokenizer.model; copy it from the model's published "
            "directory"
        )
    return GeneralTokenizer(values, settings, _template(directory, settings), str(file))


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / _TEMPLATE
    if file.is_file():
        return read_text(file)
    stored = settings.get("chat_template")
    if isinstance(stored, list):  # several by name
        named = {item.get("name"): item.get("template") for item in stored if isinstance(item, Mapping)}
        stored = named.get("default", named)
    if stored is not None and not isinstance(stored, str):
        file = directory / "tokenizer_config.json"
        raise UserError(f"{file}: chat_template must be a text, or several of which one is the default")
    return stored


@functools.cache
def byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones for themselves, the others from U+0100 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}
