"""What ``--model`` may be, with downloads from a hub on the loopback interface."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xverse.config import UserError
from xverse.formats import load_model, load_tokenizer, parity, resolve, save_hf
from xverse.hub.resolve import choose_files

from .loopback_hub import LoopbackHub, serve

CHAT = "xverse/XVERSE-7B-Chat"
SHARD = "pytorch_model-00002-of-00003.bin"
PROGRAM = """
import sys
from xverse.config import UserError
from xverse.formats import resolve
try:
    print(resolve(sys.argv[1]))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def hub(upstream: Path) -> Iterator[LoopbackHub]:
    """The upstream directory, served as ``xverse/XVERSE-7B-Chat``."""
    with serve(LoopbackHub(CHAT, upstream)) as hub:
        yield hub


class Client:
    """``resolve`` in a process of its own, since huggingface_hub reads its environment once."""

    def __init__(self, home: Path, endpoint: str, program: str = PROGRAM) -> None:
        self.program = program
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def start(self, model: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", self.program, model],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def resolve(self, model: str, **environment: str) -> Path:
        process = self.start(model, **environment)
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        return Path(out.strip())

    def refused(self, model: str, **environment: str) -> str:
        """The last line of stderr, after notices."""
        process = self.start(model, **environment)
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 2, (out, errors)
        assert "Traceback" not in errors
        return errors.strip().splitlines()[-1]


@pytest.fixture
def client(hub: LoopbackHub, tmp_path: Path) -> Client:
    return Client(tmp_path / "home", hub.endpoint)


def test_download_and_use(hub: LoopbackHub, client: Client, model: Any, tiny_tokenizer: Any) -> None:
    path = client.resolve(CHAT)
    assert parity(model, load_model(path)) == 0.0
    assert load_tokenizer(path).encode("你好 7B") == tiny_tokenizer.encode("你好 7B")
    fetched = hub.fetched()
    assert sorted(fetched) == sorted(name for name in hub.files if not name.endswith(".py"))

    assert client.resolve(CHAT) == path
    assert hub.fetched() == fetched  # nothing twice
    assert client.resolve(CHAT, HF_HUB_OFFLINE="1") == path
    assert client.resolve(CHAT, HF_ENDPOINT="http://127.0.0.1:9") == path  # a hub that is down

    damaged = (path / SHARD).resolve()  # on the disk, after the download was verified
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert SHARD in client.refused(CHAT, HF_HUB_OFFLINE="1")
    assert client.resolve(CHAT) == path
    assert hub.fetched() == [*fetched, SHARD]


def test_embedded_model_under_the_published_name(tmp_path: Path) -> None:
    try:
        nano = resolve("nano")
    except UserError:
        pytest.skip("this checkout holds no embedded model")
    with serve(LoopbackHub(CHAT, nano)) as hub:
        path = Client(tmp_path / "home", hub.endpoint).resolve(CHAT)
    assert parity(load_model(nano), load_model(path)) == 0.0
    assert load_tokenizer(nano).hash == load_tokenizer(path).hash


def test_broken_connection_is_resumed(hub: LoopbackHub, client: Client, model: Any) -> None:
    hub.cut = {SHARD: 40_000}
    path = client.resolve(CHAT)
    assert parity(model, load_model(path)) == 0.0
    assert [wanted for method, name, wanted in hub.log if (method, name) == ("GET", SHARD)] == [
        "bytes=0-",
        "bytes=40000-",
    ]


def test_killed_download_is_resumed(hub: LoopbackHub, client: Client, model: Any, tmp_path: Path) -> None:
    hub.stall = {SHARD: 50_000}
    process = client.start(CHAT)
    try:
        deadline = time.monotonic() + 30
        while not any(part.stat().st_size == 50_000 for part in tmp_path.glob("home/hub/*/blobs/*.part")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    hub.released.set()
    hub.log.clear()
    path = client.resolve(CHAT)
    assert parity(model, load_model(path)) == 0.0
    assert ("GET", SHARD, "bytes=50000-") in hub.log
    assert not list(tmp_path.glob("home/hub/*/blobs/*.part"))


DATASET = """
import sys
from xverse.config import UserError
from xverse.hub.datasets import fetch_dataset
try:
    print(fetch_dataset(sys.argv[1], None, ["*.parquet", "*.jsonl"]))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
LIBRARY = "import sys, huggingface_hub as hub; print(hub.snapshot_download(sys.argv[1]))"


def test_dataset(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.parquet").write_bytes(bytes(range(256)) * 400)
    (source / "test.jsonl").write_text('{"text": "a"}\n')
    (source / "loader.py").write_text("raise SystemExit")
    with serve(LoopbackHub("org/set", source, "datasets")) as hub:
        client = Client(tmp_path / "home", hub.endpoint, DATASET)
        hub.cut = {"train.parquet": 40_000}
        path = client.resolve("org/set")
        assert {item.name: item.read_bytes() for item in path.iterdir()} == {
            name: content for name, content in hub.files.items() if name != "loader.py"
        }
        assert ("GET", "train.parquet", "bytes=40000-") in hub.log
        assert client.resolve("org/set", HF_HUB_OFFLINE="1") == path
        damaged = (path / "train.parquet").resolve()
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        assert "train.parquet does not have the hub's checksum" in client.refused("org/set")
        assert client.resolve("org/set") == path
        assert "has no dataset 'org/sett'" in client.refused("org/sett")
        assert "not in the cache" in client.refused("org/sett", HF_HUB_OFFLINE="1")


def test_the_library_alone_starts_a_killed_download_over(hub: LoopbackHub, tmp_path: Path) -> None:
    """The reason for ``xverse.hub.huggingface``; once this fails, ``snapshot_download`` can replace it."""
    client = Client(tmp_path / "home", hub.endpoint, LIBRARY)
    hub.stall = {SHARD: 50_000}
    process = client.start(CHAT)
    try:
        deadline = time.monotonic() + 60
        while ("GET", SHARD, None) not in hub.log:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.5)
    finally:
        process.kill()
        process.communicate()
    hub.released.set()
    hub.log.clear()
    client.resolve(CHAT)
    assert [wanted for method, name, wanted in hub.log if (method, name) == ("GET", SHARD)] == [None]


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_wrong_checksum(hub: LoopbackHub, client: Client, model: Any, name: str) -> None:
    hub.corrupt = {name}
    error = client.refused(CHAT)
    assert error.startswith(f"{CHAT}: {name} does not have the hub's checksum")
    assert "fetches it again" in error
    hub.corrupt = set()
    assert parity(model, load_model(client.resolve(CHAT))) == 0.0


def test_safetensors_are_preferred(model: Any, tiny_tokenizer: Any, upstream: Path, tmp_path: Path) -> None:
    save_hf(model, tiny_tokenizer, tmp_path / "both")
    for path in upstream.glob("pytorch_model*"):
        (tmp_path / "both" / path.name).write_bytes(path.read_bytes())
    with serve(LoopbackHub("me/both", tmp_path / "both")) as hub:
        path = Client(tmp_path / "home", hub.endpoint).resolve("me/both")
        assert not [name for name in hub.fetched() if name.endswith((".bin", ".py"))]
    assert parity(model, load_model(path)) == 0.0


def test_unknown_id_and_no_hub(client: Client) -> None:
    error = client.refused("xverse/XVERSE-7B-Chatt")
    assert "has no model 'xverse/XVERSE-7B-Chatt'; did you mean 'xverse/XVERSE-7B-Chat'?" in error
    assert "HF_HUB_OFFLINE is set" in client.refused(CHAT, HF_HUB_OFFLINE="1")
    error = client.refused(CHAT, HF_ENDPOINT="http://127.0.0.1:9")
    assert "not in the cache, and http://127.0.0.1:9 cannot be reached" in error


def test_choice_of_files() -> None:
    small = ["config.json", "tokenizer.json", "LICENSE", "modeling_xverse.py", "extra/model.safetensors"]
    single, index = "model.safetensors", "model.safetensors.index.json"
    assert choose_files("m", [*small, single]) == ["LICENSE", "config.json", "tokenizer.json", single]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", index]
    assert choose_files("m", [*small, *shards, "pytorch_model.bin"])[3:] == shards
    gptq = ["gptq_model-4bit-128g.safetensors", "quantize_config.json"]
    assert set(gptq) < set(choose_files("m", [*small, *gptq]))
    with pytest.raises(UserError, match="no weights"):
        choose_files("m", [*small, "model.gguf"])
    with pytest.raises(UserError, match=r"no config\.json"):
        choose_files("m", [single])


def test_directories_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run-final").mkdir()
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("run-final") == Path("run-final")
    assert resolve("org/model") == Path("org/model")  # a directory before a hub id
    for model, part in (
        ("nanoo", "did you mean 'nano'?"),
        ("run-finel", "did you mean 'run-final'?"),
        (str(tmp_path / "run-finel"), "run-final'?"),
        ("", "no model ''"),
        ("a/b/c", "not a hub id"),
    ):
        with pytest.raises(UserError) as caught:
            resolve(model)
        assert part in str(caught.value)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve("weights.bin")


def test_modelscope(hub: LoopbackHub, client: Client, model: Any, tmp_path: Path) -> None:
    pytest.importorskip("modelscope")
    environment = {"MODELSCOPE_ENDPOINT": hub.endpoint, "MODELSCOPE_CACHE": str(tmp_path / "cache")}
    hub.corrupt = {SHARD}
    assert "does not have ModelScope's checksum" in client.refused(f"modelscope:{CHAT}", **environment)
    hub.corrupt = set()
    path = client.resolve(CHAT, XVERSE_HUB="modelscope", **environment)
    assert parity(model, load_model(path)) == 0.0
    assert not [name for name in hub.fetched() if name.endswith(".py")]
    error = client.refused("modelscope:xverse/XVERSE-8B-Chat", **environment)
    assert "has no model 'xverse/XVERSE-8B-Chat'; did you mean" in error


def test_modelscope_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("modelscope", "modelscope.hub", "modelscope.hub.snapshot_download"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for model, choice in ((f"modelscope:{CHAT}", ""), (CHAT, "modelscope")):
        monkeypatch.setenv("XVERSE_HUB", choice or "huggingface")
        with pytest.raises(UserError, match=r"needs modelscope, which is not installed; run: pip install"):
            resolve(model)
    monkeypatch.setenv("XVERSE_HUB", "gitee")
    with pytest.raises(UserError, match="XVERSE_HUB is 'gitee'"):
        resolve(CHAT)
