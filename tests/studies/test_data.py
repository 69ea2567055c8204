from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.studies.data import measure
from xverse.config import UserError
from xverse.tokenizer import Tokenizer


@pytest.mark.thorough
def test_shards_are_measured_beside_the_library(
    tmp_path: Path, tiny_texts: list[str], tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # which it sets for itself
        monkeypatch.setenv(name, "1")
    rows = [json.dumps({"text": f"{text} {i}", "lang": "en"}) for i, text in enumerate(tiny_texts * 3)]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "en.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    tiny_tokenizer.save(tmp_path / "tokenizer")
    corpus, tokenizer = str(tmp_path / "corpus"), str(tmp_path / "tokenizer")
    figures = measure(corpus, "encode", tokenizer, directory=str(tmp_path), workers=2, repeat=2)["encode"]
    assert figures["library_mb_s"] > 0
    assert figures["shards_mb_s"] > 0
    assert 20 < figures["peak_mb"]["encode"] < 2_000
    assert figures["text_mb"] == pytest.approx(
        2 * sum(len(json.loads(row)["text"].encode()) for row in rows) / 1e6, 0.1
    )
    assert figures["vocabulary"] == tiny_tokenizer.vocab_size
    with pytest.raises(UserError, match="no such corpus folder"):
        measure(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such file"):
        measure(corpus, "encode", str(tmp_path / "nowhere"))
