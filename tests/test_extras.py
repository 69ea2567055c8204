"""Optional packages: every use of ``need`` names an extra that exists and installs the package."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from xverse import config, remote
from xverse.config import UserError, install_command, need

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python"}  # of modules with another name


def packages(extra: str) -> set[str]:
    """The distributions that an extra installs, also by way of other extras."""
    names: set[str] = set()
    for requirement in EXTRAS[extra]:
        if inner := re.match(r"xverse-lm\[(.+)\]", requirement):
            names |= {name for part in inner[1].split(",") for name in packages(part)}
        else:
            names.add(re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-"))
    return names


def uses() -> Iterator[tuple[str, str, str]]:
    """(file:line, module, extra) of every call of ``need`` in the package."""
    for path in sorted((ROOT / "src" / "xverse").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need":
                if ast.unparse(node.args[0]) == "_CLIENTS[protocol]":
                    continue  # tested below
                module, extra = (ast.literal_eval(argument) for argument in node.args[:2])
                yield f"{path.relative_to(ROOT)}:{node.lineno}", module, extra


def test_every_use_names_an_extra_that_installs_the_package() -> None:
    found = list(uses())
    assert len(found) > 15
    for place, module, extra in found:
        assert extra in EXTRAS, place
        name = module.partition(".")[0]
        assert DISTRIBUTIONS.get(name, name.replace("_", "-")) in packages(extra), place


def test_packages_of_remote_stores() -> None:
    for protocol, package in remote._CLIENTS.items():
        assert package in packages("data" if protocol == "hdfs" else "remote"), protocol


def test_messages_about_missing_packages_are_written_once() -> None:
    copied = ("shim.py", "modeling_xverse.py", "configuration_xverse.py")  # go where xverse may be missing
    pattern = r"pip install +(-e )?[\"'\\]*(\.|xverse-lm)\[|(except|raise) (ImportError|ModuleNotFound)"
    others = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "src" / "xverse").rglob("*.py"))
        if path.name not in ("config.py", *copied) and re.search(pattern, path.read_text(encoding="utf-8"))
    ]
    assert others == []


def test_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert need("json.decoder", "eval", "x").JSONDecoder
    assert need("json", "eval", "x", load=False) is None
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as if it were not installed
    message = r"^a\.model needs sentencepiece, which is not installed; run: pip install -e '\.\[eval\]'$"
    with pytest.raises(UserError, match=message):
        need("sentencepiece", "eval", "a.model")
    with pytest.raises(UserError, match="--deepspeed needs nosuchpackage, which is not installed"):
        need("nosuchpackage", "finetune", "--deepspeed", load=False)
    monkeypatch.setattr(config, "__file__", str(tmp_path / "site-packages" / "xverse" / "config.py"))
    assert install_command("eval") == "pip install 'xverse-lm[eval]'"


def test_need_of_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "half_there.py").write_text("import nosuchpackage")
    (tmp_path / "broken.py").write_text("from json import nosuchname")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="x needs nosuchpackage, which is not installed"):
        need("half_there", "eval", "x")
    with pytest.raises(UserError, match=r"x needs broken, which cannot be imported \(cannot import name"):
        need("broken", "eval", "x")
