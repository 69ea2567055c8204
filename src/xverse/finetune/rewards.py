"""Rewards of replies: rules that need no model, folders of reward models, and functions of the user's own.

A rule reads columns of the prompt's item, such as ``answer``. The keys of ``check`` are those of
``eval/replies.py``.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse import hardware
from xverse.config import UserError, nearest
from xverse.eval import replies
from xverse.finetune.settings import Settings, split_names

if TYPE_CHECKING:
    from xverse.finetune.encode import Prompt

Columns = Mapping[str, Any]


@dataclass
class Completion:
    """A reply: its ``text`` without the end, its ``ids`` with it, their log-probabilities when they were
    drawn, and whether it ended by itself."""

    ids: list[int]
    text: str
    logprobs: list[float]
    finished: bool


@dataclass(frozen=True)
class Rule:
    """``score`` gives the reward of a reply, 0 to 1, from its item's columns; ``missing`` says what an item
    lacks for it, or an empty string."""

    score: Callable[[Completion, Columns], float]
    missing: Callable[[Columns], str]
    runs_code: bool = False


def _says(wanted: str, fits: Callable[[Any], bool], column: str = "answer") -> Callable[[Columns], str]:
    return lambda columns: "" if fits(columns.get(column)) else f"no {wanted} in '{column}'"


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _has_number(value: Any) -> bool:
    value = _plain(value)
    return isinstance(value, str) and replies.last_number(value) is not None


def _number(reply: Completion, columns: Columns) -> float:
    wanted = replies.last_number(_plain(columns["answer"]))
    return float(wanted is not None and replies.wrong_number(reply.text, wanted) is None)


def _checkable(allow_code: bool, columns: Columns) -> str:
    check = columns.get("check")
    if not isinstance(check, Mapping) or not check:
        return "no mapping of rules in 'check'"
    try:
        replies.check_rules(check)
    except ValueError as error:
        return f"check: {error}"
    return "a program to run, which needs --allow_code" if "program" in check and not allow_code else ""


def _check(reply: Completion, columns: Columns) -> float:
    reason = "stop" if reply.finished else "length"
    return float(replies.problem(reply.text, reason, columns["check"], True) is None)


def _program(reply: Completion, columns: Columns) -> float:
    return float(replies.wrong_program(reply.text, columns["test"], True) is None)


def _language(reply: Completion, columns: Columns) -> float:
    return float(bool(reply.text.strip()) and not replies.wrong_language(reply.text, columns["language"]))


def rules(settings: Settings) -> dict[str, Rule]:
    """The rules by name."""
    pattern = re.compile(settings.reward_pattern or "", re.DOTALL)
    most = settings.max_completion_length
    nothing: Callable[[Columns], str] = lambda columns: ""  # noqa: E731
    return {
        "check": Rule(_check, partial(_checkable, settings.allow_code), settings.allow_code),
        "number": Rule(_number, _says("number", _has_number)),
        "exact": Rule(
            lambda reply, columns: float(reply.text.strip() == _plain(columns["answer"]).strip()),
            _says("text", lambda value: _text(_plain(value))),
        ),
        "format": Rule(lambda reply, columns: float(bool(pattern.fullmatch(reply.text.strip()))), nothing),
        "program": Rule(_program, _says(*replies.VALUES["program"], "test"), True),
        "language": Rule(_language, _says(*replies.VALUES["language"], "language")),
        "finished": Rule(lambda reply, columns: float(reply.finished), nothing),
        "brevity": Rule(lambda reply, columns: 1 - len(reply.ids) / most, nothing),
    }


def rules_of(settings: Settings) -> list[Rule]:
    """The rules among ``reward_funcs``. Raises UserError for a name that is neither a rule nor anything else,
    and for a ``reward_pattern`` that is not a regular expression."""
    try:
        known = rules(settings)
    except re.error as error:
        raise UserError(f"reward_pattern: not a regular expression ({error})") from None
    names = split_names(settings.reward_funcs)
    for name in names:
        if name not in known and not Path(name).is_dir() and ":" not in name:
            raise UserError(
                f"reward_funcs: '{name}' is neither a rule{nearest(name, known)} ({', '.join(known)}), nor a "
                "folder, nor module:function"
            )
    return [known[name] for name in names if name in known]


def _function(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names, found by the command line's Python path."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: of no name
        raise UserError(
            f"reward_funcs: {name} was not found ({error}); the module must be on PYTHONPATH"
        ) from None
    except Exception as error:
        raise UserError(
            f"reward_funcs: {module} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not callable(found):
        raise UserError(f"reward_funcs: {name} is not a function")
    result: Callable[..., Any] = found
    return result


class Rewards:
    """Scores replies by all ``reward_funcs``. ``score_model(folder)`` gives a function that scores replies by
    a reward model. Raises UserError for a function that cannot be imported."""

    def __init__(self, settings: Settings, score_model: Callable[[str], Callable[..., list[float]]]) -> None:
        known = rules(settings)
        self.names = split_names(settings.reward_funcs)
        weights = split_names(settings.reward_weights or "")
        self.weights = [float(weight) for weight in weights] or [1.0] * len(self.names)
        self._scores: list[Callable[[Sequence[Prompt], Sequence[Completion]], list[float]]] = []
        for name in self.names:
            if name in known:
                self._scores.append(partial(_by_rule, known[name]))
            elif Path(name).is_dir():
                self._scores.append(score_model(name))
            else:
                self._scores.append(partial(_by_function, name, _function(name)))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[float]]:
        """For each completion its rewards, one for each name; ``prompts`` are repeated."""
        columns = [score(prompts, completions) for score in self._scores]
        return [list(row) for row in zip(*columns, strict=True)]

    def total(self, row: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self.weights, row, strict=True))


def _by_rule(rule: Rule, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    def score(pair: tuple[Completion, Prompt]) -> float:
        return rule.score(pair[0], pair[1].columns)

    pairs = list(zip(completions, prompts, strict=True))
    if not rule.runs_code:
        return [score(pair) for pair in pairs]
    with ThreadPoolExecutor(hardware.cores().usable) as threads:  # they wait for programs
        return list(threads.map(score, pairs))


def _by_function(
    name: str, function: Callable[..., Any], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[float]:
    """As trl calls it: lists of texts, and of each column of the items; None counts as 0."""
    if not completions:
        return []
    common = set.intersection(*(set(prompt.columns) for prompt in prompts))
    columns = {key: [prompt.columns[key] for prompt in prompts] for key in sorted(common)}
    given = {
        **columns,
        "prompts": [prompt.text for prompt in prompts],
        "completions": [completion.text for completion in completions],
        "completion_ids": [completion.ids for completion in completions],
    }
    try:
        values = [0.0 if value is None else float(value) for value in function(**given)]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward_funcs: {name} failed ({type(error).__name__}: {error})") from error
    if len(values) != len(completions) or not all(map(math.isfinite, values)):
        raise UserError(
            f"reward_funcs: {name} returned {len(values)} values for {len(completions)} replies, "
            f"{sum(map(math.isfinite, values))} of them finite"
        )
    return values
