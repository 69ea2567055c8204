"""Strict configuration: right values arrive with their types, wrong ones are named."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from xverse.config import UserError, build, choose, load, nearest, read_yaml


@dataclass
class Schedule:
    steps: int
    rate: float = 3e-4
    kind: Literal["cosine", "constant"] = "cosine"


@dataclass
class Recipe:
    out: Path
    schedule: Schedule
    seed: int | None = None
    shuffle: bool = True
    languages: list[str] = field(default_factory=list)
    betas: tuple[float, ...] = (0.9, 0.95)
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schedule.steps < 0:
            raise ValueError("schedule.steps must not be negative")


def values(**changes: Any) -> dict[str, Any]:
    return {"out": "runs/x", "schedule": {"steps": 10}, **changes}


def test_build() -> None:
    recipe = build(
        Recipe,
        values(
            seed=7, languages=["zh", "en"], betas=[0.9, 0.99], weights={"zh": 1, "en": 0.5}, shuffle=False
        ),
        "r.yaml",
    )
    assert recipe == Recipe(
        Path("runs/x"), Schedule(10), 7, False, ["zh", "en"], (0.9, 0.99), {"zh": 1.0, "en": 0.5}
    )
    assert isinstance(recipe.weights["zh"], float)


def test_off_is_a_word_where_it_is_a_choice() -> None:
    @dataclass
    class Check:
        preflight: Literal["off", "warn"] = "warn"

    assert build(Check, yaml.safe_load("preflight: off"), "r.yaml").preflight == "off"
    with pytest.raises(UserError, match="'True' is not one of off, warn"):
        build(Check, yaml.safe_load("preflight: on"), "r.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sede": 1}, "r.yaml: unknown key 'sede'; did you mean 'seed'?"),
        ({"qqqq": 1}, "r.yaml: unknown key 'qqqq'"),
        ({"schedule": {"step": 1}}, "r.yaml: unknown key 'schedule.step'; did you mean 'steps'?"),
        (
            {"sede": 1, "schedule": {"step": 1, "qqqq": 2}},
            "r.yaml: unknown keys 'schedule.step' (did you mean 'steps'?), 'schedule.qqqq', "
            "'sede' (did you mean 'seed'?)",
        ),
        ({"schedule": {}}, "r.yaml: schedule: missing key 'steps'"),
        ({"schedule": 5}, "r.yaml: schedule: expected a mapping, found int"),
        ({"schedule": {"steps": "ten"}}, "r.yaml: schedule: steps: expected int, found str 'ten'"),
        ({"schedule": {"steps": 10**400}}, "schedule: steps: 1000"),
        ({"schedule": {"steps": 1e300}}, "… is out of range"),
        ({"schedule": {"steps": 1.5}}, "steps: expected int, found float '1.5'"),
        ({"schedule": {"steps": True}}, "steps: expected int, found bool 'True'"),
        ({"schedule": {"steps": 1, "rate": "fast"}}, "rate: expected float, found str 'fast'"),
        ({"schedule": {"steps": 1, "kind": "linear"}}, "kind: 'linear' is not one of cosine, constant"),
        ({"schedule": {"steps": -1}}, "r.yaml: schedule.steps must not be negative"),
        ({"seed": "x"}, "seed: expected int, found str 'x'"),
        ({"shuffle": 1}, "shuffle: expected bool, found int '1'"),
        ({"languages": "zh"}, "languages: expected a list, found str"),
        ({"languages": ["zh", 3]}, "languages[1]: expected str, found int '3'"),
        ({"weights": {"zh": "much"}}, "weights.zh: expected float, found str 'much'"),
    ],
)
def test_mistakes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        build(Recipe, values(**changes), "r.yaml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_load_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("out: ~/x\nschedule: {steps: 100, rate: 3e-4}\n")  # YAML 1.1 reads 3e-4 as text
    recipe = load(Recipe, path, ["schedule.steps=5", "seed=null", "languages=[zh]", "weights.zh=2"])
    assert recipe.schedule == Schedule(5, 3e-4)
    assert recipe.languages == ["zh"]
    assert recipe.weights == {"zh": 2.0}
    assert recipe.out == Path("~/x").expanduser()
    assert load(Recipe, path, ["seed=1"], {"seed": 2}).seed == 2
    for override, said in {
        "schedule.stps=5": "did you mean 'steps'?",
        "steps": "expected key=value",
        "seed=[1": "not valid YAML",
        "out.x=1": "'out' is not a section",
    }.items():
        with pytest.raises(UserError, match=re.escape(said)):
            load(Recipe, path, [override])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"a: [1", "line 1, column 6: expected ',' or ']'"),
        (b"a:\n\t- b", "line 2, column 1: found character '\\t'"),
        (b"\xff\xfe\x00", "invalid UTF-8 at byte 0; save it as UTF-8"),
        (b"a: \x00", "r.yaml: unacceptable character"),
        (b"- 1\n- 2\n", "expected a mapping of keys to values"),
        (b"[" * 5000, "nested too deeply"),
        (b"a: " + b"9" * 6000, "Exceeds the limit"),
        (b"a: 2024-13-45", "month must be in 1..12"),
        (b"a: !!python/name:os.system", "could not determine a constructor"),
        (b"a: 1\nb: {c: 2,\n c: 3}", "line 3: key 'c' is given twice"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert "Errno" not in str(error.value)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("a: 1")
    for path, said in {
        tmp_path: "Is a directory",
        tmp_path / "loop": "Too many levels of symbolic links",
        tmp_path / "file" / "r.yaml": "Not a directory",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(UserError, match=rf": cannot be read \({said}\)$"):
            read_yaml(path)


def test_yaml_that_merges_and_begins_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "x: {b: &b {<<: &a {k: 1}, k: 2}}\nc: {<<: [*b, *a], k: 3}\n1: one\n'1': text\n", "utf-8-sig"
    )
    assert read_yaml(path) == {"x": {"b": {"k": 2}}, "c": {"k": 3}, 1: "one", "1": "text"}


def test_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


def test_choose() -> None:
    assert choose("shape", "nano", {"nano": 1, "mini": 2}) == 1
    with pytest.raises(UserError, match=r"unknown shape 'nan'; did you mean 'nano'\? \(known: nano, mini\)"):
        choose("shape", "nan", {"nano": 1, "mini": 2})


@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=5))
def test_nearest_names_an_option_or_nothing(name: str, options: list[str]) -> None:
    hint = nearest(name, options)
    assert hint == "" or any(hint == f"; did you mean '{option}'?" for option in options)


@given(
    st.builds(
        Schedule,
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.sampled_from(["cosine", "constant"]),
    )
)
def test_round_trip(schedule: Schedule) -> None:
    assert build(Schedule, vars(schedule), "x") == schedule


@dataclass
class Folder:
    out: Path


@pytest.mark.parametrize("value", ["", "a\0b", 3, None, ["x"]])
def test_what_names_no_path(value: Any) -> None:
    with pytest.raises(UserError, match="out: expected Path, found"):
        build(Folder, {"out": value}, "r.yaml")


@dataclass
class Part:
    size: int


@dataclass
class Whole:
    parts: list[Part]


def test_overrides_reach_into_lists(tmp_path):
    path = tmp_path / "whole.yaml"
    path.write_text("parts: [{size: 1}, {size: 2}]")
    assert [part.size for part in load(Whole, path, ["parts.1.size=7"]).parts] == [1, 7]
    with pytest.raises(UserError, match="items 0 to 1"):
        load(Whole, path, ["parts.2.size=7"])
