"""The random weights of a named shape that all engines run, in the format of each engine.

At 7B never more than 35 GB of disk are used: the source directory is deleted once the float16 file is
written, and generated again (weights are a function of their names) after the quantised files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from benchmarks.studies.common import make_weights
from xverse.bench.weights import placeholder_tokenizer
from xverse.config import UserError
from xverse.formats import load_model
from xverse.formats.gguf import save_gguf
from xverse.log import notice
from xverse.model import XverseConfig

# Stored bytes per parameter, with a margin.
_BYTES = {"f16": 2.0, "Q8_0": 1.07, "Q4_K_M": 0.63, "Q4_0": 0.58}


def need_disk(folder: Path, config: XverseConfig, kinds: list[str]) -> None:
    """Raises UserError if ``folder`` has no room for all files that exist at the same time."""
    parameters = config.num_parameters()
    quantised = sum(_BYTES[kind] for kind in kinds)
    needed = parameters * (2.0 + max(2.0, quantised)) + 10**8
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: needs {needed / 1e9:.0f} GB of disk temporarily, {free / 1e9:.0f} GB are free; "
            "choose another place with --work-dir, or fewer parts with --only"
        )


def make(config: XverseConfig, folder: Path, kinds: list[str]) -> Path:
    """Write ``{kind}.gguf`` of every kind into ``folder``; returns the model directory beside them."""
    source = folder / "model"
    missing = [kind for kind in kinds if not (folder / f"{kind}.gguf").is_file()]
    if missing:
        f16 = folder / "f16.gguf"
        _make_source(config, source)
        notice(f"peers: writing {f16.name}")
        tokenizer = placeholder_tokenizer(config.vocab_size)
        save_gguf(load_model(source), tokenizer, f16, "f16", overwrite=True)
        shutil.rmtree(source)
        for kind in missing:
            notice(f"peers: llama.cpp writes {kind}.gguf")
            _quantize(f16, folder / f"{kind}.gguf", kind)
        f16.unlink()
    _make_source(config, source)
    return source


def _make_source(config: XverseConfig, source: Path) -> None:
    if not source.is_dir():
        notice(f"peers: writing {2 * config.num_parameters() / 1e9:.1f} GB of random weights")
        source.mkdir(parents=True)
        make_weights(config, source, "safetensors")


def _quantize(source: Path, target: Path, kind: str) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = torch.get_num_threads()
    partial = target.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), settings):
        raise UserError(f"llama.cpp could not quantise {source} to {kind}")
    partial.rename(target)
