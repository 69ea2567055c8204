"""Shards and corpora made on the spot."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.shards import write_shard
from xverse.data.shards import Shard


@pytest.fixture
def make_shard(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Shard]:
    """``make_shard(documents, name="en")`` writes token lists as a shard and opens it."""

    def make(documents: Sequence[Sequence[int]], name: str = "en") -> Shard:
        path = tmp_path_factory.mktemp("shard") / name
        write_shard(path, [token for document in documents for token in document], list(map(len, documents)))
        return Shard.open(path)

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """120 documents: ``en`` and ``zh`` mixed in one file, ``code_py`` in a compressed file of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["\n".join((tiny_texts + tiny_texts)[i : i + 3]) + f" {i}" for i in range(120)]
    mixed = [{"text": text, "lang": "zh" if i % 2 else "en"} for i, text in enumerate(texts[:80])]
    code = [{"text": text, "lang": "py", "source": "made"} for text in texts[80:]]
    for name, items in (("both.jsonl", mixed), ("code_py.jsonl.gz", code)):
        data = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()
        (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return folder
