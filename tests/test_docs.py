"""What the pages say about commands, flags, files and rooms is true of the code."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import STUDIES
from xverse.cli import VERBS, verb_parser
from xverse.commands.bench import BENCHMARKS
from xverse.data.mixture import MixtureConfig
from xverse.data.prepare.executor import ExecutorConfig
from xverse.data.prepare.inputs import Input
from xverse.data.prepare.pipeline import PrepareRecipe, StagesConfig
from xverse.tokenizer.recipe import TokenizerRecipe
from xverse.train import PretrainRecipe
from xverse.train.settings import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "xverse"
PAGES = sorted(
    path
    for folder in (".", "docs", "benchmarks", "benchmarks/clients", "recipes/skills")
    for path in (ROOT / folder).glob("*.md")
)
MANUALS = [path for path in PAGES if path.name not in ("LOG.md", "CHANGELOG.md")]  # those are of their day
PARSERS = {verb: verb_parser(verb) for verb in VERBS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def names(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def commands(page: Path) -> Iterator[list[str]]:
    """The lines of a page's blocks that start xverse or a benchmark, as words."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|\| |&& |\()(xverse|python -m benchmarks) ([^|&()<>#]+)", line)
            if match and language in ("", "shell", "bash") and "…" not in line and "[" not in line:
                yield [match[1], *shlex.split(match[2])]


@pytest.mark.parametrize("page", names(MANUALS))
def test_commands_in_blocks_have_a_verb_and_flags_that_exist(page: Path) -> None:
    for program, name, *rest in commands(page):
        command = shlex.join([program, name, *rest])
        if program == "xverse":
            assert name in VERBS, command
            parser = PARSERS[name]
            try:
                parser.parse_args(rest) if parser.below() else parser.parse_intermixed_args(rest)
            except SystemExit:  # the parser has written the reason to stderr
                pytest.fail(command)
        else:
            known = study_flags(name)
            for flag in rest:
                assert not flag.startswith("--") or flag in known, f"{page.name}: {command}: {flag}"


def study_flags(name: str) -> set[str]:
    """The flags of a measurement, read from its source, whose import would take seconds."""
    path = SOURCE / "bench" / f"{name}.py"
    if name in STUDIES:
        path = ROOT / "benchmarks" / f"{STUDIES[name][0].replace('.', '/')}.py"
    shared = (SOURCE / "bench" / "options.py", ROOT / "benchmarks" / "studies" / "common.py")
    text = "".join(source.read_text(encoding="utf-8") for source in (path, *shared))
    return {"--help", "--model", *re.findall(r'"(--[a-z-]+)"', text)}


@pytest.mark.parametrize("page", names(MANUALS))
def test_commands_in_sentences_have_a_verb_and_flags_that_exist(page: Path) -> None:
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        match = re.match(r"(xverse|python -m benchmarks) ([a-z][\w-]*)(.*)", span, re.DOTALL)
        if match and match[2] != "…":
            known = VERBS.keys() if match[1] == "xverse" else STUDIES.keys() | BENCHMARKS.keys()
            assert match[2] in known, f"{page.name}: {span}"
            flags = PARSERS[match[2]].known_flags() if match[1] == "xverse" else study_flags(match[2])
            words = match[3].split()
            for word in words:
                assert not word.startswith("--") or word.split("=")[0] in flags, f"{page.name}: {span}"
            below = PARSERS[match[2]].below() if match[1] == "xverse" else {}
            if words and below:  # an action, or a value in its place
                assert words[0] in below, f"{page.name}: {span}: an action is missing"


@pytest.mark.parametrize(
    ("page", "recipe"),
    [
        *(("data", recipe) for recipe in (PrepareRecipe, StagesConfig, ExecutorConfig, Input, MixtureConfig)),
        *(("training", recipe) for recipe in (PretrainRecipe, TrainConfig)),
        ("tokenizer", TokenizerRecipe),
    ],
)
def test_every_key_of_a_recipe_is_described(page: str, recipe: type) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    code = " ".join((*re.findall(r"```yaml\n(.*?)```", text, re.DOTALL), *re.findall(r"`([^`\n]+)`", text)))
    for field in dataclasses.fields(recipe):
        assert re.search(rf"\b{field.name}\b", code), f"docs/{page}.md omits {field.name}"


def test_every_measurement_has_a_name_of_its_own_and_a_row() -> None:
    assert not STUDIES.keys() & BENCHMARKS.keys()
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name in (*STUDIES, *BENCHMARKS):
        assert re.search(rf"^\|.*`{name}`.*\|", page, re.MULTILINE), f"benchmarks/README.md omits {name}"
    pages = [path.name for path in (ROOT / "benchmarks").glob("*.md") if path.name != "README.md"]
    assert [name for name in pages if f"]({name})" not in page] == []


def test_every_route_is_described() -> None:
    page = re.sub(r"\{\w+\}", "{}", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    for path in (SOURCE / "serve").rglob("*.py"):
        for route in re.findall(r'@app\.\w+\("(/[^"]+)"', path.read_text(encoding="utf-8")):
            internal = route.startswith("/page/") or route.endswith(
                "{path:path}"
            )  # the page's; 404 for others
            shown = re.sub(r"\{[\w:]+\}", "{}", route)
            assert internal or f"{shown}`" in page, f"docs/api.md omits {route}"


def test_every_environment_variable_is_described() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in MANUALS)
    for path in SOURCE.rglob("*.py"):
        for name in re.findall(r"environ\S*\W(XVERSE_[A-Z_]+)\W", path.read_text(encoding="utf-8")):
            assert f"`{name}" in text, f"{path.name} reads {name}, which no page describes"


def test_every_room_is_on_the_map() -> None:
    rooms = [path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()]
    modules = [path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py"]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in (*(f"{room}/" for room in rooms), *modules):
        assert f"`{name}`" in page, f"architecture.md omits {name}"
    for readme in ("README.md", "README_zh.md"):
        tree = (ROOT / readme).read_text(encoding="utf-8").partition("src/xverse/\n")[2]
        for room in rooms:
            assert re.search(rf"(^|\s){room}/", tree, re.MULTILINE), f"{readme} omits {room}/"


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_files_that_are_named_exist(name: str) -> None:
    places = [ROOT, ROOT / "tests", SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir())]
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:/|\.py|\.cpp|\.h|\.yaml))`", text):
        assert any((place / path).exists() for place in places), f"{name} names {path}"
