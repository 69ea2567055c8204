"""What ``load_foreign`` recognises, and what it refuses in one line that names the cause."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.config import UserError
from xverse.formats.foreign import load_foreign

from .foreign_zoo import ZOO, random_tensors, write


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_foreign(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.fixture
def make(tmp_path: Path, foreign_tokenizers: dict[str, Path]) -> Callable[..., Path]:
    def make(name: str, folder: str = "model", **options: Any) -> Path:
        directory = write(
            tmp_path / folder, ZOO[name], options.pop("tensors", random_tensors(ZOO[name])), **options
        )
        kind = "byte-level" if name.startswith("falcon") else "sentencepiece"
        return shutil.copytree(foreign_tokenizers[kind], directory, dirs_exist_ok=True)

    return make


def test_generation_stops_at_the_tokenizers_tokens(make: Callable[..., Path]) -> None:
    generation = load_foreign(make("chatglm2", bos_token_id=0, eos_token_id=1)).model.generation_config
    assert generation.eos_token_id == 2


def test_an_unknown_family_lists_the_known(make: Callable[..., Path]) -> None:
    text = refusal(make("chatglm2", model_type="qwen"))
    assert "model_type 'qwen' is not supported (supported: chatglm, RefinedWebModel)" in text


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("chatglm2", {"multi_query_attention": False}, "multi_query_attention False is not supported"),
        ("chatglm2", {"rmsnorm": False}, "rmsnorm False is not supported, only True is"),
        ("chatglm2", {"kv_channels": 26}, "kv_channels 26 cannot be rotated by half"),
        ("chatglm2", {"multi_query_group_num": 3}, "multi_query_group_num 3 does not divide 4 heads"),
        ("falcon-old", {"new_decoder_architecture": True}, "new_decoder_architecture True is not supported"),
        ("falcon-old", {"alibi": True}, "alibi True is not supported"),
        ("falcon-old", {"n_head": 5}, "hidden_size 64 does not divide into 5"),
        ("chatglm2", {"hidden_size": None}, "missing key 'hidden_size'"),
        ("chatglm2", {"hidden_size": "64"}, "hidden_size must be a positive integer, found '64'"),
        (
            "chatglm2",
            {"num_attention_heads": True},
            "num_attention_heads must be a positive integer, found True",
        ),
        ("chatglm2", {"layernorm_epsilon": 0}, "layernorm_epsilon must be a positive number, found 0"),
        ("falcon-old", {"activation": "relu"}, "activation 'relu' is not supported, only 'gelu' is"),
        ("falcon-old", {"rope_scaling": {"factor": 2.0}}, "rope_scaling {'factor': 2.0} is not supported"),
        ("chatglm2", {"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_settings_that_are_not_supported(
    name: str, config: dict[str, Any], said: str, make: Callable[..., Path]
) -> None:
    text = refusal(make(name, **config))
    assert "config.json" in text
    assert said in text


def test_the_first_chatglm(make: Callable[..., Path]) -> None:
    directory = make("chatglm2")
    config = json.loads((directory / "config.json").read_text())
    del config["multi_query_group_num"]
    (directory / "config.json").write_text(json.dumps(config))
    assert "is the first ChatGLM" in refusal(directory)


@pytest.mark.parametrize("name", ["chatglm2", "falcon-old"])
def test_tensors_that_do_not_fit_are_named_as_published(name: str, make: Callable[..., Path]) -> None:
    tensors = random_tensors(ZOO[name])
    matrices = [key for key, tensor in tensors.items() if tensor.dim() == 2]
    gone, odd = matrices[1], matrices[2]
    rows, columns = tensors[odd].shape
    changed = {key: tensor for key, tensor in tensors.items() if key != gone}
    changed |= {odd: torch.zeros(rows + 1, columns), "stranger.weight": torch.zeros(1)}
    text = refusal(make(name, tensors=changed))
    assert f"missing {gone}; unexpected stranger.weight; " in text
    assert f"{odd} is {rows + 1}×{columns} where the settings say {rows}×{columns}" in text


def test_a_matrix_of_integers(make: Callable[..., Path]) -> None:
    tensors = random_tensors(ZOO["chatglm2"])
    directory = make("chatglm2", tensors=tensors)
    name = "transformer.output_layer.weight"
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)
    torch.save(tensors, directory / "pytorch_model.bin")
    assert f"{name} is stored as int8" in refusal(directory)


def test_a_weight_file_with_code(make: Callable[..., Path], tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    directory = make("chatglm2")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Payload()}, protocol=2))
    assert "code in weight files is never run" in refusal(directory)
    assert not (tmp_path / "ran").exists()


def test_directories_without_a_part(make: Callable[..., Path], tmp_path: Path) -> None:
    directory = make("falcon-old", "falcon")
    (directory / "tokenizer.json").unlink()
    assert "has no tokenizer.json; copy it" in refusal(directory)
    directory = make("chatglm2", "glm")
    (directory / "tokenizer.model").rename(directory / "tokenizer.json")
    assert "has no tokenizer.model; copy it" in refusal(directory)
    directory = make("chatglm2", "weights")
    (directory / "pytorch_model.bin").unlink()
    assert "has no weights" in refusal(directory)
    assert "no such directory" in refusal(tmp_path / "nothing")


def test_broken_tokenizers(make: Callable[..., Path]) -> None:
    directory = make("chatglm2")
    (directory / "tokenizer.model").write_bytes(b"not a model")
    assert "tokenizer.model: cannot be read" in refusal(directory)
    directory = make("falcon-old", "falcon")
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "tokenizer.json: cannot be read as a tokenizer" in refusal(directory)
    (directory / "tokenizer.json").write_text("{")
    assert "tokenizer.json: invalid JSON" in refusal(directory)


def test_a_tokenizer_of_another_model(make: Callable[..., Path]) -> None:
    assert "the tokenizer has 485 tokens, the model only 484" in refusal(
        make("chatglm2", padded_vocab_size=484)
    )


def test_without_sentencepiece(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make("chatglm2")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "needs sentencepiece, which is not installed; run: pip install -e '.[eval]'" in refusal(directory)
