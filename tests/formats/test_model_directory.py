"""``ModelDirectory``: each file of a model is opened once, whatever a command does with it."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import forkserver
from xverse.config import UserError
from xverse.formats import ModelDirectory, load_model, resolve

# Runs a command line and prints how often each file of the directory was opened. The weights are mapped by
# safetensors' own code, which Python does not see.
PROGRAM = """
import json, os, sys
from collections import Counter
directory, opened = os.path.realpath(sys.argv[1]), Counter()
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)):
        folder, name = os.path.split(os.path.realpath(args[0]))
        if folder == directory and not name.endswith(".safetensors"):
            opened[name] += 1
sys.addaudithook(hook)
if sys.argv[2] == "load_engine":
    from xverse.engine.load import load_engine
    load_engine(sys.argv[1])
else:
    from xverse.cli import main
    assert main(sys.argv[2:]) == 0
print("\\nOPENED" + json.dumps(opened))
"""


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve("nano"), tmp_path / "nano"))


def opened(directory: Path, *arguments: str) -> Counter[str]:
    done = forkserver.run(
        [sys.executable, "-c", PROGRAM, str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Counter(json.loads(done.stdout.rpartition("OPENED")[2]))


@pytest.mark.parametrize(
    "arguments",
    [
        ("load_engine",),
        ("chat", "--ask", "hi", "--max-new-tokens", "2", "--model", "{model}"),
        ("chat", "--ask", "hi", "--max-new-tokens", "2", "--quantize", "int8", "--model", "{model}"),
        ("quantize", "--bits", "8", "--out", "{out}", "--model", "{model}"),
        ("export", "--format", "hf", "--out", "{out}", "--model", "{model}"),
        ("export", "--format", "gguf", "--out", "{out}.gguf", "--model", "{model}"),
        ("eval", "run", "--tasks", "skills", "--limit", "1", "--out", "{out}", "--model", "{model}"),
    ],
    ids=lambda arguments: " ".join(arguments[:4]),
)
def test_each_file_is_opened_once(nano: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    count = opened(nano, *(item.format(model=nano, out=tmp_path / "out") for item in arguments))
    assert count["config.json"] == 1
    documents = ("LICENSE", "NOTICE", "README")  # copied into an exported directory
    assert {
        name: times for name, times in count.items() if times > 1 and not name.startswith(documents)
    } == {}


def test_what_a_directory_holds(nano: Path) -> None:
    directory = ModelDirectory.of(nano)
    assert ModelDirectory.of(directory) is directory
    assert ModelDirectory.named(directory) is directory
    assert directory.name == str(directory) == str(nano)
    assert ModelDirectory.named("nano").name == "nano"
    assert directory.config is directory.config
    assert (directory.model_type, directory.scheme) == ("xverse", None)
    assert directory.tokenizer.vocab_size <= directory.config.vocab_size
    assert directory.generation_config == json.loads((nano / "generation_config.json").read_text())
    assert [file.name for file in directory.weight_files] == ["model.safetensors"]
    shutil.rmtree(nano / "__pycache__", ignore_errors=True)
    (nano / "config.json").unlink()  # nothing of it is read again
    assert set(load_model(directory).state_dict()) == set(directory.tensors.names)


def test_a_directory_of_a_tokenizer_alone(nano: Path) -> None:
    (nano / "config.json").unlink()
    directory = ModelDirectory.of(nano)
    assert directory.tokenizer.encode("hi")
    with pytest.raises(UserError, match=r"not a model directory: no config\.json"):
        _ = directory.config
