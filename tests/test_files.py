"""Atomic writing: after a kill at any moment there is the old version or the new one, never half."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forkserver
from xverse.config import UserError
from xverse.files import alone, atomic_directory, atomic_file, read_sealed, recover_directory, sealed

FILES = {f"part-{i}.bin": bytes([i]) * 5000 for i in range(20)}


def contents(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted(path.iterdir())}


def write(path: Path, files: dict[str, bytes]) -> None:
    with atomic_directory(path) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)


def write_half(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError("the second half is missing")


def leftovers(path: Path) -> list[str]:
    return [item.name for item in path.iterdir() if item.name.startswith(".")]


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.json"
    with atomic_file(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError, match="half"), atomic_file(path) as temporary:
        write_half(temporary)
    assert path.read_text() == "old"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert leftovers(path.parent) == []


def test_directory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path, {"a": b"1", "b": b"2"})
    with pytest.raises(OSError, match="half"), atomic_directory(path) as temporary:
        write_half(temporary / "a")
    assert contents(path) == {"a": b"1", "b": b"2"}
    write(path, {"c": b"3"})
    assert contents(path) == {"c": b"3"}
    assert leftovers(tmp_path) == []


# Runs atomic_directory and is killed with -9 just before its N-th call of one of these functions. Their
# calls are everything that the block does to the file system once the block's own body has run.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import xverse.files as files

path, moment = Path(sys.argv[1]), int(sys.argv[2])
count = 0

def counted(function):
    def call(*arguments, **options):
        global count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir")):
    setattr(module, name, counted(getattr(module, name)))
with files.atomic_directory(path) as temporary:
    for i in range(3):
        (temporary / f"new-{i}").write_bytes(bytes([i]) * 3000)
        counted(lambda: None)()
print(count)
"""


def run_killed(path: Path, moment: int) -> int:
    return forkserver.run(
        [sys.executable, "-c", KILLED, str(path), str(moment)], capture_output=True
    ).returncode


def test_killed_at_every_moment(tmp_path: Path) -> None:
    new = {f"new-{i}": bytes([i]) * 3000 for i in range(3)}
    old = {"old-a": b"a", "old-b": b"b"}
    seen = set()
    for moment in range(1, 100):
        path = tmp_path / str(moment) / "model"
        write(path, old)
        code = run_killed(path, moment)
        recover_directory(path)
        found = contents(path)
        assert found in (old, new), f"half a directory after a kill at moment {moment}"
        seen.add("old" if found == old else "new")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        write(path, old)  # a later write finds nothing in its way
        assert contents(path) == old
    assert code == 0
    assert moment > 10
    assert seen == {"old", "new"}


def test_killed_while_the_body_writes(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path, FILES)
    code = (
        "import sys, time\nfrom xverse.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as temporary:\n"
        "    (temporary / 'part-0.bin').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    with forkserver.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert contents(path) == FILES


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"), atomic_file(tmp_path / "x"):
        pass


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), atomic_directory(tmp_path / "file" / "model"):
        pass


@pytest.mark.parametrize("make", ["mkdir", "fifo", "file", "missing"])
def test_what_cannot_be_replaced_stays(make: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    writers = [atomic_file]
    if make == "mkdir":
        target.mkdir()
        (target / "mine").touch()
    elif make == "fifo":
        os.mkfifo(target)
        writers.append(atomic_directory)
    elif make == "file":
        target.touch()
        writers = [atomic_directory]
    else:
        target = Path("/proc/target")  # where even root may not create anything
        writers.append(atomic_directory)
    kind = target.stat().st_mode if target.exists() else None
    for writer in writers:
        with pytest.raises(UserError, match=r"cannot be written|is not a f"), writer(target):
            pytest.fail("the block must not run, because it may take hours")
        assert (target.stat().st_mode if target.exists() else None) == kind
    with pytest.raises(UserError, match="cannot be written"), alone(Path("/proc/lock"), "busy"):
        pass
    assert [path.name for path in tmp_path.iterdir()] in ([], ["target"])


def test_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path, {"a": b"1"})
    with pytest.raises(UserError, match="the disk is full; nothing was written"), atomic_directory(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert contents(path) == {"a": b"1"}
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses everybody")
@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_a_place_where_nobody_may_write_is_named(writer):
    with pytest.raises(UserError, match=r"/proc/xverse/out: cannot be written"), writer("/proc/xverse/out"):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from xverse.files import alone
with alone(sys.argv[1], "taken"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_has_a_lock_until_it_ends(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    with forkserver.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="taken"), alone(lock, "taken"):
            pass
        holder.kill()
    with alone(lock, "taken"):  # what the killed one left does not matter
        (lock.parent / "made").touch()
    assert [path.name for path in lock.parent.iterdir()] == ["made"]
    with pytest.raises(KeyError), alone(tmp_path / "other" / ".lock", "taken"):
        raise KeyError
    assert not (tmp_path / "other").exists()


def test_a_sealed_file_shows_every_changed_byte(tmp_path: Path) -> None:
    values = {"step": 12, "loss": 1.25, "identity": {"ä": [1e-3, None, True]}, "files": {"a": [3, "ff"]}}
    text = sealed(values).encode()
    file = tmp_path / "state.json"
    for place in range(len(text)):
        for bit in (0, 5):
            file.write_bytes(text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :])
            try:
                read = read_sealed(file)
            except ValueError:
                continue
            # The name of the digest itself, or another blank: nothing that a run reads has changed.
            assert {key: read[key] for key in values} == values, (place, bit)
    file.write_bytes(text)
    assert read_sealed(file) == values
    file.write_text('{"step": 1}')  # of an earlier version
    assert read_sealed(file) == {"step": 1}
