"""Training from a recipe: what the weights do, what is resumed, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import forkserver
from xverse.cli import main
from xverse.config import UserError, build
from xverse.tokenizer import Tokenizer, native
from xverse.tokenizer.recipe import TokenizerRecipe, train_recipe

pytestmark = pytest.mark.skipif(native.library() is None, reason="the compiled part was not built")
LARGE, SMALL = (
    "the quick brown fox jumps over the lazy dog again and again ",
    "ein kleiner Satz über Äpfel 水果 ",
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "en.txt").write_text(LARGE * 200, encoding="utf-8")
    (folder / "de.jsonl").write_text(json.dumps({"text": SMALL * 3}), encoding="utf-8")
    return folder


def recipe(corpus: Path, out: str, **values: Any) -> TokenizerRecipe:
    return build(
        TokenizerRecipe,
        {"corpus": corpus, "out": corpus.parent / out, "vocab_size": 325, "limit_alphabet": 60, **values},
        "recipe.yaml",
    )


def test_weights_decide_whose_words_become_entries(corpus: Path) -> None:
    lengths: dict[str, int] = {}
    for name, values in {
        "as the texts are": {"temperature": 1.0},
        "equal": {"temperature": 0.0},
        "German": {"temperature": 0.0, "shares": {"de": 50.0}},
        "by need": {"temperature": 1.0, "rounds": 1},
    }.items():
        report = train_recipe(recipe(corpus, name, vocab_size=312, **values))
        tokenizer = Tokenizer.load(corpus.parent / name)
        assert report["hash"] == tokenizer.hash
        assert tokenizer.vocab_size == 312
        lengths[name] = len(tokenizer.encode(SMALL))
        assert tokenizer.decode(tokenizer.encode(SMALL)) == SMALL
    assert lengths["German"] < lengths["equal"] < lengths["as the texts are"]
    assert lengths["by need"] < lengths["as the texts are"]


def test_coverage_keeps_a_small_languages_characters(corpus: Path) -> None:
    report = train_recipe(recipe(corpus, "few", limit_alphabet=20, min_frequency=1, vocab_size=310))
    assert report["languages"]["de"]["single_characters"] < 0.9
    values = {"limit_alphabet": 0, "character_coverage": 1.0}
    report = train_recipe(recipe(corpus, "all", **values))
    assert report["languages"]["de"]["single_characters"] == 1
    ranges = {"limit_alphabet": 0, "characters": ["61-7A", "6C34"], "vocab_size": 300}
    train_recipe(recipe(corpus, "ranges", **ranges))
    vocab = Tokenizer.load(corpus.parent / "ranges").values["model"]["vocab"]
    assert {"a", "z", "水", "▁"} <= vocab.keys()
    assert not {"果", "Ä", "S"} & vocab.keys()


def test_complete_is_complete_and_others_are_refused(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train_recipe(recipe(corpus, "out"))
    capsys.readouterr()
    assert train_recipe(recipe(corpus, "out", memory_gb=1.0, threads=2)) == first
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="other settings or texts"):
        train_recipe(recipe(corpus, "out", temperature=0.5))
    (corpus.parent / "out" / "training.json").unlink()
    with pytest.raises(UserError, match="of another recipe"):
        train_recipe(recipe(corpus, "out"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 280}, "leaves no room for merges"),
        ({"vocab_size": 9000}, "too small: it gives"),
        ({"languages": ["en", "fr"]}, "no texts of 'fr'"),
        ({"shares": {"enn": 2}}, "no texts of 'enn'; did you mean 'en'"),
        ({"shares": {"en": 0}}, "'en' must be above 0"),
        ({"characters": ["zz"]}, "4E00-9FFF, found 'zz'"),
        ({"temperature": 1.5}, "temperature must be between 0 and 1"),
        ({"langauges": ["en"]}, "unknown key 'langauges'; did you mean 'languages'"),
    ],
)
def test_refusals(corpus: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_recipe(recipe(corpus, "out", **values))
    assert not (corpus.parent / "out" / "tokenizer.json").exists()


def test_a_language_without_text_is_named(corpus: Path) -> None:
    (corpus / "fr.txt").touch()
    with pytest.raises(UserError, match=r"fr\.txt: is empty; 'fr' has no text"):
        train_recipe(recipe(corpus, "out"))
    (corpus / "fr.txt").unlink()
    (corpus / "fr.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match=r"fr\.jsonl: no usable text"):
        train_recipe(recipe(corpus, "out"))


def test_killed_training_goes_on_to_the_same(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"corpus: {corpus}\nvocab_size: 325\nlimit_alphabet: 60\ntemperature: 0.2\n")

    def start(out: str) -> subprocess.Popen[str]:
        command = ["-m", "xverse.cli", "tokenizer", "train", str(path), f"out={tmp_path / out}"]
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        return forkserver.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True
        )

    whole = start("whole")
    out, _ = whole.communicate()
    assert whole.returncode == 0
    assert out.rstrip().endswith(str(tmp_path / "whole"))
    for mark in ("counts/de/words.json", "counts/en/words.json"):
        process = start("killed")
        while process.poll() is None and not (tmp_path / "killed" / mark).exists():
            time.sleep(0.001)
        process.kill()
        process.communicate()
    last = start("killed")
    last.communicate()
    assert last.returncode == 0
    assert Tokenizer.load(tmp_path / "killed").hash == Tokenizer.load(tmp_path / "whole").hash


def test_the_command_line_and_the_recipes(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = Path(__file__).parents[2] / "recipes" / "tokenizer"
    common = [f"corpus={corpus}", "shares={}", "--vocab-size"]
    out = str(tmp_path / "balanced")
    assert (
        main(["tokenizer", "train", str(recipes / "xverse-balanced.yaml"), *common, "625", "--out", out]) == 0
    )
    assert capsys.readouterr().out.rstrip().endswith(out)
    assert Tokenizer.load(out).vocab_size == 625
    compat = [str(recipes / "xverse-compat.yaml"), f"corpus={corpus}", f"out={tmp_path / 'compat'}"]
    assert main(["tokenizer", "train", *compat]) == 2
    error = capsys.readouterr().err
    assert "too small: it gives" in error
    characters = int(error.partition("entries (")[2].split()[0])
    assert 96_000 < characters < 97_500  # the published structure: about 96,500 single characters
    assert main(["tokenizer", "train", str(recipes / "xverse-compat.yaml"), "corpsu=x"]) == 2
    assert "did you mean 'corpus'" in capsys.readouterr().err
    assert main(["tokenizer", "train", str(corpus)]) == 2
    assert "--out is missing" in capsys.readouterr().err
