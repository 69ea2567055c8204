"""A model directory whose files are each read once, when first used."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.config import UserError, nearest
from xverse.formats.packed import Packing, UnpackedFiles, packing_of
from xverse.formats.schemes import Scheme, quantization_of
from xverse.formats.weights import IGNORED_SUFFIX, TensorFiles, listed, read_tensors, weight_files
from xverse.hub.resolve import resolve
from xverse.model import XverseConfig
from xverse.texts import read_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from xverse.tokenizer import Tokenizer


class ModelDirectory:
    """Config, generation config, quantisation scheme, weight files and tokenizer of a directory.

    Nothing is read before it is used, and nothing twice. ``name`` is how the user named the model:
    ``nano``, a hub id or the path.
    """

    kind = ""  # what it is, if only this project's engine reads it
    config_name = "config.json"  # in messages

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or str(path)

    @classmethod
    def of(cls, source: str | Path | ModelDirectory) -> ModelDirectory:
        """``source`` itself, or the directory at this path."""
        if isinstance(source, ModelDirectory):
            return source
        return cls._at(Path(source))

    @classmethod
    def _at(cls, path: Path, name: str | None = None) -> ModelDirectory:
        if path.suffix.lower() == ".gguf" and not path.is_dir():
            from xverse.formats.gguf_read import GgufFile

            return GgufFile(path, name)
        if path.is_dir():
            from xverse.formats.checkpoint import model_at

            return model_at(path, name) or cls(path, name)
        return cls(path, name)

    @classmethod
    def named(cls, model: str | Path | ModelDirectory) -> ModelDirectory:
        """The directory of ``nano``, a path or a hub id; raises UserError as ``resolve`` does."""
        return cls._at(resolve(model), model) if isinstance(model, str) else cls.of(model)

    @property
    def plain_path(self) -> Path:
        """The path, for libraries that read model directories. Raises UserError for a GGUF file and a
        checkpoint."""
        if self.kind:
            raise UserError(
                f"{self.name}: is {self.kind}, which only this project's engine reads; write a model "
                f"directory first: xverse export --model {self.name} --format hf --out DIR"
            )
        return self.path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def values(self) -> dict[str, Any]:
        """``config.json`` as stored. Raises UserError where this is not a model directory."""
        return read_object(check_directory(self.path) / "config.json")

    @property
    def model_type(self) -> str:
        """``xverse``, ``llama`` or another publisher's, as ``config.json`` has it."""
        return str(self.values.get("model_type"))

    @cached_property
    def config(self) -> XverseConfig:
        """The shape of the model, XVERSE's or one of the Llama family's (``model/families.py``).

        Raises UserError that names what does not fit: another model type, a feature that the forward pass
        lacks, weights quantised in an unsupported way.
        """
        file, values = self.path / self.config_name, self.values
        _ = self.scheme  # an unsupported one is reported here already
        if values.get("model_type") is None:
            raise UserError(f"{file}: model_type None is not supported; the file should name one")
        return XverseConfig.from_json(values, str(file))

    @cached_property
    def scheme(self) -> Scheme | None:
        """How the weights are quantised, or None. Raises UserError for an unsupported method."""
        return quantization_of(self.path, self.values)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """``generation_config.json``; empty if there is none. Raises UserError for what is not a token id."""
        file = self.path / "generation_config.json"
        values = read_object(file) if file.exists() else {}
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = values.get(key)
            listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if any(type(index) is not int for index in listed):
                raise UserError(f"{file}: {key} must be a token id, or several in a list, found {ids!r}")
        return values

    @cached_property
    def weight_files(self) -> list[Path]:
        """The weight files in the index's order. Raises UserError where any is missing."""
        return weight_files(self.path)

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the weights, taken to be that of the first."""
        for file in self.weight_files[:1]:
            for name, tensor in read_tensors(file):
                if not name.endswith(IGNORED_SUFFIX):
                    return tensor.dtype
        raise UserError(f"{self.weight_files[0]}: holds no tensors")

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """All stored tensors under the model's names."""
        for file in self.weight_files:
            for name, tensor in read_tensors(file):
                if self._packing is None:
                    yield name, tensor
                else:
                    yield from self._packing.unpacked(name, tensor)

    @cached_property
    def tensors(self) -> TensorFiles:
        """The stored tensors by the model's name."""
        if self._packing is None:
            return TensorFiles(self.weight_files)
        return UnpackedFiles(self.weight_files, self._packing)

    @cached_property
    def _packing(self) -> Packing | None:
        """How the publisher's tensors differ from the model's, or None."""
        return packing_of(self.values, self.config) if self.model_type == "baichuan" else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, repaired in memory if it is one that XVERSE published broken.

        Raises UserError if there is none or if its ids exceed the model's vocabulary. The directory may hold
        nothing but a tokenizer.
        """
        tokenizer = self.unchecked_tokenizer
        if (self.path / "config.json").exists():
            check_vocabulary(tokenizer, self.config, self.path)
        return tokenizer

    @cached_property
    def unchecked_tokenizer(self) -> Tokenizer:
        """``tokenizer``, also of a model that the forward pass does not compute."""
        from xverse.tokenizer import Tokenizer
        from xverse.tokenizer.general import GeneralTokenizer, load_tokenizer_of
        from xverse.tokenizer.published import published

        has_config = (self.path / "config.json").exists()
        if has_config and self.model_type != "xverse":
            tokenizer = load_tokenizer_of(self.path)
            if isinstance(tokenizer, GeneralTokenizer) and tokenizer.template is None:
                tokenizer = published(tokenizer, self.values, self.generation_config, self.path)
        else:
            if not (self.path / "tokenizer.json").is_file():
                raise UserError(
                    f"{self}: has no tokenizer.json; copy it from the model's published directory"
                )
            tokenizer = Tokenizer.load(self.path)
        return tokenizer


class AssembledDirectory(ModelDirectory):
    """One whose ``tensors`` are put together from what is stored; they are never quantised."""

    @cached_property
    def scheme(self) -> Scheme | None:
        return None

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors.names:
            yield name, self.tensors.get(name)


def check_directory(path: str | Path) -> Path:
    """``path`` as a Path. Raises UserError if it is not a model directory, with what it holds instead."""
    path = Path(path)
    if not path.exists():
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such directory{nearest(path.name, siblings)}")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; give the model directory that holds config.json")
    if not (path / "config.json").exists():
        names = sorted(item.name for item in path.iterdir())
        holds = f"it holds {listed(names)}" if names else "it is empty"
        raise UserError(f"{path}: not a model directory: no config.json ({holds})")
    return path


def check_vocabulary(tokenizer: Tokenizer, config: XverseConfig, where: str | Path) -> None:
    """Raise UserError if the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; "
            "they do not belong together"
        )


def load_tokenizer(source: str | Path | ModelDirectory) -> Tokenizer:
    """``ModelDirectory.tokenizer`` of a path."""
    return ModelDirectory.of(source).tokenizer
