"""Data that changes under a run, and data in which there is nothing to learn."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from xverse.cli import main
from xverse.config import UserError
from xverse.data.feed import PretrainFeed
from xverse.data.mixture import MixtureConfig
from xverse.data.prepare.pipeline import PrepareRecipe, prepare
from xverse.data.watch import ShardWatch
from xverse.train.checkpoint import kept
from xverse.train.plot import read_metrics


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def scribble(shard: Path) -> None:
    """Other tokens in a file of the same size, after its marker was written."""
    file = shard / "tokens.bin"
    data = bytearray(file.read_bytes())
    data[:400] = data[400:800]
    file.write_bytes(data)
    later = (shard / "DONE").stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))


def test_a_shard_that_changes_is_found_by_its_digest(copied: Path) -> None:
    shards = PretrainFeed(copied, MixtureConfig(), 48, seed=0).train
    watch = ShardWatch(shards.values())
    assert watch() == ""
    touched = (copied / "train" / "en" / "DONE").stat().st_mtime_ns + 10**9
    os.utime(copied / "train" / "en" / "tokens.bin", ns=(touched, touched))
    assert watch() == "", "touched, but of the same content"
    scribble(copied / "train" / "zh")
    assert watch().startswith(
        f"{copied / 'train' / 'zh' / 'tokens.bin'}: changed since it was prepared (SHA-256"
    )
    shutil.rmtree(copied / "train" / "zh")
    assert "this shard can no longer be read" in watch() or "prepared again" in watch()


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin"])
@pytest.mark.parametrize("newer", [True, False])
def test_a_flipped_bit_of_any_file_of_a_shard_is_found(
    copied: Path, split: str, name: str, newer: bool
) -> None:
    file = copied / split / "zh" / name
    data, times = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 16 * 8] ^= 1  # of an offset: the lowest bit, so that offsets still increase
    assert len(data) > 16
    file.write_bytes(data)
    if not newer:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    feed = PretrainFeed(copied, MixtureConfig(), 48, seed=0)
    watch = ShardWatch([*feed.train.values(), *feed.valid.values()])
    assert watch() == f"{file}: changed since it was prepared (SHA-256 differs); prepare it again"


def test_a_shard_that_changes_under_a_running_job_ends_it_without_a_checkpoint(
    write_recipe: Callable[..., Path], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xverse.config import load
    from xverse.train import PretrainRecipe, pretrain
    from xverse.train.checkpoint import Checkpointer

    recipe = write_recipe({"data": str(copied)}, steps=12, checkpoint_every=4)
    save = Checkpointer.save

    def then_scribble(self: Checkpointer, step: int, *rest: object) -> Path:
        path = save(self, step, *rest)  # type: ignore[arg-type]
        scribble(copied / "train" / "zh")
        return path

    monkeypatch.setattr(Checkpointer, "save", then_scribble)
    with pytest.raises(UserError, match="changed since it was prepared"):
        pretrain(load(PretrainRecipe, recipe))
    monkeypatch.undo()
    assert [path.name for path in kept(tmp_path / "run").all()] == ["step-00000004"]
    assert main(["pretrain", str(recipe)]) == 2, "nor does it begin again with them"


def test_documents_without_text_are_no_error(
    write_recipe: Callable[..., Path], tiny_texts: list[str], tmp_path: Path
) -> None:
    """Empty ones, ones of white space and ones of a single character among the others."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = ["\n".join((tiny_texts * 3)[i : i + 2]) + f" {i}" for i in range(100)]
    texts += ["", " ", "\n\n", "a"] * 15
    lines = [json.dumps({"text": text, "lang": "en"}) for text in texts]
    (corpus / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = tmp_path / "prepared"
    prepare(PrepareRecipe(corpus, data, vocab_size=600, valid_share=0.1, max_bad_share=0.5))
    size = PretrainFeed(data, MixtureConfig(), 48, seed=0).tokenizer.vocab_size
    recipe = write_recipe({"data": str(data)}, steps=3)
    assert main(["pretrain", str(recipe), f"shape.vocab_size={size}"]) == 0
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
