"""Shared fixtures. Tests use the CPU and loopback alone; real data comes through ``test_data`` only."""

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

import pytest

# Set before torch or huggingface_hub is imported anywhere; subprocesses that tests start inherit it.
_hf_home = tempfile.mkdtemp(prefix="xverse-tests-hf-")
atexit.register(shutil.rmtree, _hf_home, ignore_errors=True)
os.environ["HF_HOME"] = _hf_home
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

ROOT = Path(__file__).resolve().parent.parent
# The one place that knows where real data stands when XVERSE_TEST_DATA does not say.
DEFAULT_TEST_DATA = ROOT.parent / "shared" / "data"


# Files in which few tests take long. Several workers take whole files: begun last, one of these would let the
# others wait for it.
LONGEST = (
    "serve/test_image.py",
    "train/test_layouts.py",
    "serve/test_page.py",
    "serve/test_page_turns.py",
    "finetune/test_distributed.py",
    "test_wheel.py",
    "train/test_optimizer.py",
    "train/test_resume.py",
    "data/test_duplicates.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(ROOT / "tests").as_posix()
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    """Refuse every connection and name look-up that would leave this machine."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"  # a path is a Unix socket
        host = host.decode() if isinstance(host, bytes) else host
        if not (host in (None, "", "localhost", "::1", "0.0.0.0", "::") or host.startswith("127.")):
            raise OSError(f"tests use no network, but something wants to reach {host}")

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
    """The folder of real data sets; skips where there is none."""
    path = Path(os.environ.get("XVERSE_TEST_DATA") or DEFAULT_TEST_DATA)
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set XVERSE_TEST_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Some lines in each of about twenty languages, and a little code."""
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
    """An ``XverseConfig`` of 2 layers whose sizes groups of 128 divide."""
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
    """``XverseForCausalLM`` of 2 layers in float32, the same random weights each time."""
    from xverse.model.transformer import XverseForCausalLM, init_weights

    model = XverseForCausalLM(tiny_config)
    init_weights(model, seed=0)
    return model.eval()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB, or of the size that the test asks for, where this may be mounted."""
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
