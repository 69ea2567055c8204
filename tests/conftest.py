"""Shared fixtures. Tests use the CPU and loopback only; real data comes from ``test_data``."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Set before torch or huggingface_hub is imported; subprocesses of tests inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share it
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="xverse-tests-hf-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

from tests import forkserver  # noqa: E402: it notes the environment
from tests.scale import ALL, examples

hypothesis.settings.register_profile("scaled", max_examples=examples(100))
hypothesis.settings.load_profile("scaled")

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Fork the parallel workers, so that torch is imported once and not in each of them."""
    import execnet.gateway_io as gateway

    class Master(gateway.Popen2IOMaster):
        def __init__(self, command: list[str], execmodel: Any) -> None:
            self.popen = forkserver.Worker(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            gateway.Popen2IO.__init__(self, self.popen.stdin, self.popen.stdout, execmodel=execmodel)

    gateway.Popen2IOMaster = Master  # type: ignore[misc]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start files marked ``slow`` first: workers take whole files, and would wait for one begun last.
    Leave out what is marked ``thorough`` unless XVERSE_TEST_ALL is set."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not ALL:
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="thorough: make test-all, or XVERSE_TEST_ALL=1"))


def pytest_collection_finish() -> None:
    """Libraries set variables when they are imported, as all are now."""
    forkserver.AT_IMPORT.update(os.environ)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Undo what libraries write to the environment: programs that later tests start would differ in it from
    the fork server, and get interpreters of their own."""
    before = dict(os.environ)
    yield
    if before != dict(os.environ):
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    """Refuse connections and name look-ups that leave this machine."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"  # a path is a Unix socket
        host = host.decode() if isinstance(host, bytes) else host
        if not (host in (None, "", "localhost", "::1", "0.0.0.0", "::") or host.startswith("127.")):
            raise OSError(f"tests must not use the network; tried to reach {host}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        check((host,))
        return getaddrinfo(host, *arguments, **options)

    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data sets that XVERSE_TEST_DATA names; skips without one."""
    name = os.environ.get("XVERSE_TEST_DATA")
    if not name:
        pytest.skip("needs real data: set XVERSE_TEST_DATA to its folder")
    path = Path(name)
    assert path.is_dir(), f"XVERSE_TEST_DATA: {path} is not a folder"
    return path


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Lines in about twenty languages, and some code."""
    return (ROOT / "tests" / "tiny_corpus.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_texts: list[str]) -> Any:
    """A ``Tokenizer`` of XVERSE's structure with a vocabulary of about 700."""
    from xverse.tokenizer import train_tokenizer

    return train_tokenizer(tiny_texts, vocab_size=700, min_frequency=1)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer: Any) -> Any:
    """An ``XverseConfig`` of 2 layers for the tiny tokenizer."""
    from xverse.model.config import XverseConfig

    return XverseConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


@pytest.fixture(scope="session")
def wide_config(tiny_tokenizer: Any) -> Any:
    """An ``XverseConfig`` of 2 layers whose sizes are multiples of 128."""
    from xverse.model.config import XverseConfig

    return XverseConfig(
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )


@pytest.fixture
def tiny_model(tiny_config: Any) -> Any:
    """``XverseForCausalLM`` of 2 layers in float32 with fixed random weights."""
    from xverse.model.transformer import XverseForCausalLM, init_weights

    model = XverseForCausalLM(tiny_config)
    init_weights(model, seed=0)
    return model.eval()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB, or of the size in the test's parameter; skips where mounting is refused."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '600k')}", "tmpfs", str(path)]
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not permitted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)
