"""Find the directory of a ``--model``: ``nano``, a local directory, or a hub id.

From either hub only the files that a model needs are downloaded: configs, tokenizer, weights (safetensors if
a repository has both kinds) and licence. ``.py`` files are never fetched.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Iterable
from pathlib import Path

from xverse.config import UserError, is_url, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PUBLISHED = [
    f"xverse/XVERSE-{name}"
    for name in ("7B", "7B-Chat", "13B", "13B-Chat", "13B-2", "13B-2-Chat", "65B", "65B-2", "65B-Chat")
]
NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",  # of other publishers' models
    "quantize_config.json",  # of GPTQ models
)
DOCUMENTS = ("LICENSE", "NOTICE")
MODELSCOPE = "modelscope:"


def resolve(model: str) -> Path:
    """The local directory, or .gguf file, of ``model``; a hub id or URL is downloaded.

    ``nano`` is the embedded model. A URL such as ``s3://bucket/folder`` names what a path does. Hub ids are
    fetched from Hugging Face (HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN apply), or from ModelScope if written
    ``modelscope:org/name`` or with XVERSE_HUB=modelscope. Raises UserError for any other name, an unknown id,
    no network and a wrong checksum.
    """
    if model == "nano":
        return _embedded()
    if is_url(model):
        from xverse.hub import store

        return store.fetch_model(model, lambda names: choose_files(model, names), (*NEEDED, *DOCUMENTS))
    path = Path(model).expanduser()
    if model and path.is_dir():  # Path("") is the current directory
        return path
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if path.is_file():
        raise UserError(
            f"{model}: is a file; give a .gguf file or the model directory that holds config.json"
        )
    name = model.removeprefix(MODELSCOPE)
    if HUB_ID.fullmatch(name):
        if name != model or _hub() == "modelscope":
            from xverse.hub import modelscope

            return modelscope.fetch(name)
        from xverse.hub import huggingface

        return huggingface.fetch(name, lambda names: choose_files(name, names))
    here = path.parent if path.parent.is_dir() else Path()
    options = [str(here / item.name) for item in here.iterdir() if item.is_dir()]
    hint = nearest(model, ["nano", *options, *PUBLISHED])
    raise UserError(f"no model '{model}': not a directory, not 'nano', not a hub id like org/name{hint}")


def _embedded() -> Path:
    path = Path(str(importlib.resources.files("xverse") / "assets" / "nano"))
    if not (path / "config.json").exists():
        raise UserError("this installation has no embedded model 'nano'; give a directory or a hub id")
    return path


def _hub() -> str:
    hub = os.environ.get("XVERSE_HUB", "huggingface").lower()
    if hub not in ("huggingface", "modelscope"):
        raise UserError(f"XVERSE_HUB is '{hub}'; set it to huggingface or modelscope")
    return hub


def similar(model: str) -> str:
    """A hint with the nearest published id, or an empty string."""
    return "" if model in PUBLISHED else nearest(model, PUBLISHED)


def choose_files(model: str, names: Iterable[str]) -> list[str]:
    """The files of a repository that a model needs. Raises UserError if it has no config or no weights."""
    names = sorted(name for name in names if "/" not in name)
    chosen = [name for name in names if name in NEEDED or name.startswith(DOCUMENTS)]
    if "config.json" not in chosen:
        raise UserError(f"{model}: not a model repository: no config.json")
    for pattern in (
        r"model.*\.safetensors(\.index\.json)?",
        r"pytorch_model.*\.bin(\.index\.json)?",
        r"gptq_model-\w+bit-\w+g\.(safetensors|bin)",
    ):
        weights = [name for name in names if re.fullmatch(pattern, name)]
        if weights:
            return chosen + weights
    raise UserError(f"{model}: the repository has no weights in safetensors or .bin")
