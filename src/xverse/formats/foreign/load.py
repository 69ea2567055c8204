"""Load the published directory of another publisher's model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xverse.config import UserError
from xverse.formats.directory import ModelDirectory
from xverse.formats.foreign.families import Family, Settings, detect
from xverse.formats.foreign.text import ForeignTokenizer, load_foreign_tokenizer
from xverse.formats.weights import HEAD, check_tensors, misfit, read_tensors


@dataclass(frozen=True)
class ForeignModel:
    """A model of another publisher, in evaluation mode on the CPU."""

    model: PreTrainedModel
    tokenizer: ForeignTokenizer


def load_foreign(source: str | Path | ModelDirectory, dtype: torch.dtype | None = None) -> ForeignModel:
    """Load the model and the tokenizer of ``source``, a directory in its publisher's Hugging Face layout.

    Code in the directory is never run. ``dtype`` None keeps the stored one; parameters that need no
    conversion are then the memory-mapped files. Raises UserError, in one line, for an unsupported family or
    setting, for missing, unexpected and mis-shaped tensors by the publisher's names, and for a missing
    tokenizer.
    """
    directory = ModelDirectory.of(source)
    path = directory.path
    settings = Settings(path / "config.json", directory.values)
    chosen = detect(settings)
    files = directory.weight_files
    try:
        with torch.device("meta"):
            model = chosen.build(settings)
    except UserError:
        raise
    except Exception as error:  # transformers validates configs with its own exceptions
        raise UserError(f"{settings.file}: {' '.join(str(error).split())[:200]}") from error
    tokenizer = load_foreign_tokenizer(path, directory.model_type)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; they do not belong together"
        )
    _assign(model, _read(model, chosen, path, files, dtype))
    model.generation_config.bos_token_id = tokenizer.bos_ids[0] if len(tokenizer.bos_ids) == 1 else None
    model.generation_config.eos_token_id = tokenizer.eos_id
    return ForeignModel(model.eval(), tokenizer)


def _read(
    model: PreTrainedModel, family: Family, path: Path, files: list[Path], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The model's state dict from the published tensors."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = bool(model.config.tie_word_embeddings)
    if tied:
        del shapes[HEAD]
    parts: dict[str, list[str]] = {}  # published name → the model's names, as consecutive rows
    for name in shapes:
        parts.setdefault(family.published(name), []).append(name)
    head = family.published(HEAD)
    seen: set[str] = set()
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file):
            if name.endswith("inv_freq") or (tied and name == head):
                continue  # computed at run time; a tied head repeats the embedding
            if name not in parts:
                unexpected.append(name)
                continue
            seen.add(name)
            rows = [shapes[part][0] for part in parts[name]]
            expected = (sum(rows), *shapes[parts[name][0]][1:])
            if what := misfit(tensor, expected):
                wrong[name] = what
                continue
            dtype = dtype or tensor.dtype
            tensor = tensor.to(dtype)
            state |= dict(zip(parts[name], tensor.split(rows), strict=True))
    check_tensors(path, [name for name in parts if name not in seen], unexpected, wrong)
    return state


def _assign(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    unknown = model.load_state_dict(state, assign=True, strict=False).unexpected_keys
    assert not unknown
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    # Rotary tables are computed by their module's constructor, which ran on the meta device.
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh: nn.Module = type(module)(config=model.config)
            model.set_submodule(name, fresh)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.requires_grad_(False)
