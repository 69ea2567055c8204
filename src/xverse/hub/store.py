"""Models at URLs of every file system that fsspec reads, copied to the cache.

A URL names a model directory, a run or a checkpoint, as a path does (``formats/checkpoint.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from xverse.config import UserError
from xverse.place import LISTS, MARKS, STATE, fetch, read_list
from xverse.remote import is_web, listing, open_url, version

INDEX = "model.safetensors.index.json"
FSDP = "pytorch_model_fsdp_0/"  # of a fine-tuning checkpoint
CHECKPOINT = re.compile(rf"((?:checkpoints/step|checkpoint)-(\d+))/(?:{STATE}|{MARKS})")


def fetch_model(url: str, choose: Callable[[Iterable[str]], list[str]], probed: Iterable[str]) -> Path:
    """The copy of a model at a URL. ``choose`` selects a model directory's files by name; ``probed`` are the
    names to look for on a web server, which cannot be listed.

    Raises UserError if the URL cannot be read, has no model, or if the disk is full.
    """
    url = url.rstrip("/")
    if is_web(url):
        there = None if read_list(url) else _probe(url, [*probed, "model.safetensors", INDEX])
        return fetch(url, lambda names: _files(url, names, choose), "models", there)
    names = listing(url)
    if not names:
        raise UserError(f"{url}: no model directory here: no files")
    url = _part(url, names)
    return fetch(url, lambda names: _files(url, names, choose), "models")


def _part(url: str, names: Collection[str]) -> str:
    """The URL itself, or that of the finished model or of the newest complete checkpoint of a run."""
    if "config.json" in names or STATE in names:
        return url
    found = sorted((int(match[2]), match[1]) for match in map(CHECKPOINT.fullmatch, names) if match)
    if f"model/{MARKS}" in names:
        steps = float("inf")
        if "recipe.json" in names:
            with open_url(f"{url}/recipe.json") as file:
                steps = json.load(file)["train"]["steps"]
        if not found or found[-1][0] <= steps:
            return f"{url}/model"
    return f"{url}/{found[-1][1]}" if found else url


def _files(url: str, names: Collection[str], choose: Callable[[Iterable[str]], list[str]]) -> list[str]:
    if STATE in names:
        return list(names)
    sharded = [name for name in names if name.startswith(FSDP)]
    top = [name for name in names if "/" not in name and name not in LISTS]
    if not sharded:
        return choose(top)
    return [*choose([*top, "model.safetensors"])[:-1], *sharded]


def _probe(url: str, names: Iterable[str]) -> dict[str, list[str]]:
    """The files of a model directory on a web server, by the names that such directories have."""
    there = {name: mark for name in names if (mark := version(f"{url}/{name}")) is not None}
    if INDEX in there:
        with open_url(f"{url}/{INDEX}") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        there |= {name: version(f"{url}/{name}") or [] for name in shards}
    if not there:
        raise UserError(f"{url}: no model directory here: no files")
    return there
