"""Other publishers' models against plain PyTorch, in float32; the largest difference allowed is 1e-4."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xverse.eval.any_model import load_any
from xverse.formats import ModelDirectory, load_model
from xverse.formats.foreign import load_foreign
from xverse.formats.foreign.families import FAMILIES
from xverse.formats.quantize import load_quantizing
from xverse.model import FullCausal, XverseConfig, XverseForCausalLM

from .foreign_zoo import ZOO, random_tensors, write

TOLERANCE = 1e-4
KINDS = ("bin", "bin-indexed", "safetensors", "safetensors-indexed")


def ids_of(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 480, (rows, length), generator=torch.Generator().manual_seed(seed))


def make(name: str, path: Path, tokenizers: dict[str, Path], kind: str = "bin", **options: Any) -> Path:
    tensors = options.pop("tensors", None) or random_tensors(ZOO[name])
    directory = write(path / "model", ZOO[name], tensors, kind, **options)
    byte_level = name.startswith(("falcon", "mpt"))
    shutil.copytree(
        tokenizers["byte-level" if byte_level else "sentencepiece"], directory, dirs_exist_ok=True
    )
    return directory


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert expected.std() > 0.3, "the reference's logits hardly differ, so they would show nothing"
    return (found - expected).abs().max().item()


# Transformers or the one forward pass reads the others.
TRANSLATED = [name for name, zoo in ZOO.items() if zoo.config["model_type"] in FAMILIES]


@pytest.mark.parametrize("name", TRANSLATED)
def test_logits(name: str, tmp_path: Path, foreign_tokenizers: dict[str, Path]) -> None:
    zoo, tensors = ZOO[name], random_tensors(ZOO[name])
    directory = make(name, tmp_path, foreign_tokenizers, KINDS[list(ZOO).index(name) % 4], tensors=tensors)
    loaded = load_foreign(directory, torch.float32)
    assert not loaded.model.training
    ids = ids_of(3, 17)
    with torch.no_grad():
        assert difference(loaded.model(ids).logits, zoo.forward(tensors, zoo.config, ids, 0)) < TOLERANCE
        places = torch.arange(5, 22)[None].expand(3, -1)
        shifted = loaded.model(ids, position_ids=places).logits
        assert difference(shifted, zoo.forward(tensors, zoo.config, ids, 5)) < TOLERANCE


NATIVE = [name for name in ZOO if name.startswith(("baichuan", "internlm", "llama", "vicuna"))]


@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_the_one_forward_pass(name: str, tmp_path: Path) -> None:
    """Ours, from the published directory, and from what is exported of it; quantised while loading, too."""
    zoo, tensors = ZOO[name], random_tensors(ZOO[name])
    directory = write(tmp_path / "model", zoo, tensors, KINDS[NATIVE.index(name) % 4])
    ours, ids = load_model(directory), ids_of(3, 17)
    expected = zoo.forward(tensors, zoo.config, ids, 0)
    assert difference(ours(ids, FullCausal(3, 17)), expected) < TOLERANCE
    quantised = load_quantizing(directory, "int8")(ids, FullCausal(3, 17))
    assert (quantised - expected).norm() < 0.05 * expected.norm()  # rows of 64 random weights
    config = ours.config.to_json("float32")
    assert config["architectures"] == ["LlamaForCausalLM"]
    again = XverseForCausalLM(XverseConfig.from_json(config))
    again.load_state_dict(ours.state_dict())
    assert difference(again(ids, FullCausal(3, 17)), expected) < TOLERANCE


@pytest.mark.parametrize("name", TRANSLATED)
def test_padded_rows_and_generation(name: str, tmp_path: Path, foreign_tokenizers: dict[str, Path]) -> None:
    zoo, tensors = ZOO[name], random_tensors(ZOO[name])
    model = load_foreign(make(name, tmp_path, foreign_tokenizers, tensors=tensors), torch.float32).model
    ids = ids_of(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # the second row is seven tokens behind padding
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=places).logits
        assert difference(logits[:1], zoo.forward(tensors, zoo.config, ids[:1], 0)) < TOLERANCE
        assert difference(logits[1:, 4:], zoo.forward(tensors, zoo.config, ids[1:, 4:], 0)) < TOLERANCE
        model.generation_config.eos_token_id = None
        written = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    expected = ids[:1]
    for _ in range(6):
        following = zoo.forward(tensors, zoo.config, expected, 0)[:, -1:].argmax(-1)
        expected = torch.cat([expected, following], 1)
    assert written.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_file(kind: str, tmp_path: Path, foreign_tokenizers: dict[str, Path]) -> None:
    tensors = random_tensors(ZOO["chatglm2"])
    directory = make("chatglm2", tmp_path, foreign_tokenizers, kind, tensors=tensors)
    weight = load_foreign(directory).model.get_output_embeddings().weight
    assert torch.equal(weight, tensors["transformer.output_layer.weight"])


def test_the_stored_dtype_is_kept_and_another_converts(
    tmp_path: Path, foreign_tokenizers: dict[str, Path]
) -> None:
    tensors = random_tensors(ZOO["chatglm2"])
    directory = make("chatglm2", tmp_path, foreign_tokenizers, dtype=torch.bfloat16, tensors=tensors)
    model = load_foreign(directory).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    ids = ids_of(2, 9)
    with torch.no_grad():
        logits = load_foreign(directory, torch.float32).model(ids).logits
    assert difference(logits, ZOO["chatglm2"].forward(rounded, ZOO["chatglm2"].config, ids, 0)) < TOLERANCE


def test_a_stored_tied_head_gives_way_to_the_embedding(
    tmp_path: Path, foreign_tokenizers: dict[str, Path]
) -> None:
    """Falcon's .bin files hold the head that is the embedding once more."""
    zoo, tensors = ZOO["falcon-old"], random_tensors(ZOO["falcon-old"])
    stored = {**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}
    model = load_foreign(
        make("falcon-old", tmp_path, foreign_tokenizers, tensors=stored), torch.float32
    ).model
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    ids = ids_of(2, 9)
    assert difference(model(ids).logits, zoo.forward(tensors, zoo.config, ids, 0)) < TOLERANCE


def test_code_of_the_directory_never_runs(tmp_path: Path, foreign_tokenizers: dict[str, Path]) -> None:
    names = [name for name in ZOO if ZOO[name].code]
    for name in names:
        load_any(ModelDirectory.of(make(name, tmp_path / name, foreign_tokenizers)))
    assert len(list(tmp_path.rglob("*.py"))) == sum(len(ZOO[name].code) for name in names) > 10
    assert list(tmp_path.rglob("*.ran")) == []
    with pytest.raises(RuntimeError):  # running one leaves its mark
        runpy.run_path(str(tmp_path / "baichuan" / "model" / "modeling_baichuan.py"))
    assert len(list(tmp_path.rglob("*.ran"))) == 1
