"""What a chat model can do: example conversations to read, and an exam of ten skills, scored by rule.

The conversations are those of XVERSE-7B's README and harmful requests. ``skills.jsonl`` and
``exam.jsonl`` in the folder ``skills`` of the data directory replace the packaged ones:
{"skill", "turns": [text, …]} or {"harmful": true, "language", "turns"}, and {"skill", "language", "turns",
"check"} with the checks of ``xverse.eval.replies``. Turns are the user's; the model answers each, and the
last reply is scored.
"""

from __future__ import annotations

import importlib.resources
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xverse import hardware
from xverse.config import UserError
from xverse.data.benchmarks.questions import QuestionReader
from xverse.eval import replies
from xverse.eval.generation import Outcome, TaskRun, generate
from xverse.eval.statistics import Score, score
from xverse.log import notice
from xverse.markdown import table
from xverse.tokenizer import encode_chat

NEW_TOKENS = 256
Item = dict[str, Any]


def run(task: TaskRun) -> Outcome:
    conversations = list(_limited(_read(task.data_dir, "skills.jsonl"), task.settings.limit))
    exam = list(_limited(_read(task.data_dir, "exam.jsonl"), task.settings.limit))
    for number, item in enumerate(exam):
        _check_exam_item(item, f"exam.jsonl, item {number + 1}")
    if not task.settings.allow_code and any("program" in item["check"] for item in exam):
        notice("skills: programs are parsed, but not run; pass --allow-code to run them against their tests")
    talks, reasons = _talk(task, [*conversations, *exam])
    shown = [
        {
            "task": "skills",
            "id": str(number),
            **item,
            "messages": talk,
            "refused": replies.refuses(_last(talk)),
        }
        for number, (item, talk) in enumerate(zip(conversations, talks, strict=False))
    ]
    start = len(conversations)

    def judged(number: int) -> Item:
        item, talk = exam[number], talks[start + number]
        reason = reasons[start + number]
        problem = replies.problem(_last(talk), reason, item["check"], task.settings.allow_code)
        return {"task": "skills", "id": f"exam-{number}", **item, "messages": talk, "problem": problem}

    with ThreadPoolExecutor(hardware.cores().usable) as pool:  # programs run in processes of their own
        scored = list(pool.map(judged, range(len(exam))))
    return Outcome(
        title="Skills",
        method=f"the likeliest replies of up to {NEW_TOKENS} tokens; exam: right replies, by rule, that end "
        "by themselves and repeat nothing; refusals are recognised by their words; "
        + ("programs are run" if task.settings.allow_code else "programs are parsed, not run"),
        figures=_figures(shown, scored),
        rows=[*shown, *scored],
        page="\n".join([*_exam_page(scored), *_page(shown)]),
    )


def _last(talk: Sequence[dict[str, str]]) -> str:
    return talk[-1]["content"]


def _talk(task: TaskRun, items: Sequence[Item]) -> tuple[list[list[dict[str, str]]], list[str]]:
    """All conversations, turn by turn, and why each last reply ended."""
    engine = task.engine
    talks: list[list[dict[str, str]]] = [[] for _ in items]
    reasons = ["" for _ in items]
    total = sum(len(item["turns"]) for item in items)
    done = 0
    for turn in range(max(len(item["turns"]) for item in items)):
        going = [index for index, item in enumerate(items) if turn < len(item["turns"])]
        for index in going:
            talks[index].append({"role": "user", "content": items[index]["turns"][turn]})
        room = engine.context_length
        prompts = [
            encode_chat(
                engine.tokenizer, talks[index], max_new_tokens=NEW_TOKENS, max_positions=room, truncation=room
            ).ids
            for index in going
        ]
        answers = generate(
            engine,
            prompts,
            max_new_tokens=NEW_TOKENS,
            stop_ids=task.stop_ids,
            progress=lambda some, _, before=done: task.progress(before + some, total),  # type: ignore[misc]
        )
        done += len(going)
        for index, (reply, reason) in zip(going, answers, strict=True):
            talks[index].append({"role": "assistant", "content": reply or " "})
            reasons[index] = reason
    return talks, reasons


def _read(data_dir: Path, name: str) -> list[Item]:
    """The items of the user's file, or of the packaged one."""
    custom = data_dir / "skills" / name
    with importlib.resources.as_file(importlib.resources.files("xverse.eval") / name) as packaged:
        path = custom if custom.exists() else packaged
        items = [row for _, row in QuestionReader().objects(path)]
    if not items:
        raise UserError(f"{path}: no items")
    for item in items:
        turns = item.get("turns")
        texts = isinstance(turns, list) and all(isinstance(turn, str) and turn for turn in turns)
        if not turns or not texts:
            raise UserError(f"{path}: turns: expected a list of texts, found {json.dumps(turns)[:60]}")
    return items


def _check_exam_item(item: Item, where: str) -> None:
    for key in ("skill", "language"):
        if not isinstance(item.get(key), str) or not item[key]:
            raise UserError(f"{where}: {key}: expected a text, found {json.dumps(item.get(key))[:60]}")
    check = item.get("check")
    if not isinstance(check, dict) or not check:
        raise UserError(f"{where}: check: expected a mapping of rules, found {json.dumps(check)[:60]}")
    try:
        replies.check_rules(check)
    except ValueError as error:
        raise UserError(f"{where}: check: {error}") from None


def _limited(items: Sequence[Item], limit: int | None) -> Iterator[Item]:
    """The first ``limit`` items of each skill and language."""
    counts: dict[tuple[Any, Any], int] = defaultdict(int)
    for item in items:
        kind = (item.get("skill"), item.get("language"))
        counts[kind] += 1
        if limit is None or counts[kind] <= limit:
            yield item


def _scores(scored: Sequence[Item]) -> dict[str, dict[str, Score]]:
    """The score of each skill, by language."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in scored:
        right[row["skill"]][row["language"]].append(row["problem"] is None)
    return {
        skill: {language: score({skill: values}, "micro") for language, values in languages.items()}
        for skill, languages in right.items()
    }


def _languages(scored: Sequence[Item]) -> list[str]:
    return list(dict.fromkeys(row["language"] for row in scored))


def _mean(scored: Sequence[Item], language: str | None = None) -> Score:
    """The mean over skills."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in scored:
        if language in (None, row["language"]):
            right[row["skill"]].append(row["problem"] is None)
    return score(right, "macro")


def _figures(shown: Sequence[Item], scored: Sequence[Item]) -> dict[str, float]:
    figures = {"exam, mean of skills, %": 100 * _mean(scored).value}
    for language in _languages(scored):
        figures[f"exam, {language}, %"] = 100 * _mean(scored, language).value
    for skill, languages in _scores(scored).items():
        for language, result in languages.items():
            figures[f"{skill}, {language}, %"] = 100 * result.value
    for language in _languages(scored):
        own = [row for row in scored if row["language"] == language]
        kinds = {True: "refusals of harmful items", False: "false refusals of harmless items"}
        for wanted, title in kinds.items():
            rows = [row for row in own if row["check"].get("refuses") is wanted]
            if rows:
                refused = sum(replies.refuses(_last(row["messages"])) for row in rows)
                figures[f"{title}, {language}, %"] = 100 * refused / len(rows)
    for language in ("zh", "en"):
        harmful = [row for row in shown if row.get("harmful") and row.get("language") == language]
        if harmful:
            figures[f"refused of harmful requests, {language}, %"] = (
                100 * sum(row["refused"] for row in harmful) / len(harmful)
            )
    return figures


def _exam_page(scored: Sequence[Item]) -> list[str]:
    """A table of the skills with 95 % intervals, and the first wrong replies of each."""
    languages = _languages(scored)
    rows = [
        [skill, *(_cell(found[language]) if language in found else "–" for language in languages)]
        for skill, found in _scores(scored).items()
    ]
    rows.append(["**mean**", *(_cell(_mean(scored, language)) for language in languages)])
    lines = ["# Exam", "", *table(["skill", *languages], rows), ""]
    lines += ["Right replies in per cent, 95 % bootstrap intervals, number of items.", ""]
    for skill in dict.fromkeys(row["skill"] for row in scored):
        wrong = [row for row in scored if row["skill"] == skill and row["problem"]]
        if wrong:
            lines += [f"## {skill}: the first of {len(wrong)} wrong replies", ""]
        for row in wrong[:2]:
            lines += [f"It {row['problem']}.".replace("\n", " "), "", *_messages(row)]
    return lines


def _cell(score: Score) -> str:
    return f"{100 * score.value:.1f} ({100 * score.low:.0f}–{100 * score.high:.0f}), {score.count}"


def _page(rows: Sequence[Item]) -> list[str]:
    lines = ["# Conversations", ""]
    for row in rows:
        title = row.get("skill") or f"harmful request ({row.get('language')})"
        mark = f" — {'refused' if row['refused'] else 'not refused'}" if row.get("harmful") else ""
        lines += [f"## {title}{mark}", "", *_messages(row)]
    return lines


def _messages(row: Item) -> list[str]:
    lines = []
    for message in row["messages"]:
        quoted = message["content"].strip().replace("\n", "\n> ")
        lines += [f"**{message['role']}**", "", f"> {quoted}", ""]
    return lines
