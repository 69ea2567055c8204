"""Check a model directory against the embedded model's acceptance list and print its greedy replies.

python recipes/nano/accept.py MODEL [--markdown FILE] [--max-new-tokens N]

MODEL is a directory or ``nano``. Replies are greedy and otherwise those of ``xverse chat``, with the
repetition penalty of the model's generation_config.json. The exit code is 1 if a check fails.
``tests/test_nano.py`` applies the same functions to the embedded model.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.cli import Parser, guarded
from xverse.eval.replies import LINE_AT_MOST, repeated_line, role_text, unfinished, wrong_language
from xverse.values import whole

if TYPE_CHECKING:
    from xverse.chat.session import Session

PROMPTS = Path(__file__).resolve().parents[2] / "tests" / "nano" / "prompts.json"
NAME = "XVERSE-nano"
PARAMETERS = 11_406_592
MOST_BYTES = 25_000_000
MAX_NEW_TOKENS = 512
TITLES = {
    "general": "Replies that end by themselves",
    "identity": f"Who are you: names {NAME}",
    "greetings": "Greetings answered in their language",
    "conversations": "Three turns that keep the format",
}


@dataclass(frozen=True)
class Reply:
    """One reply. ``prompt`` is the user's last turn, ``language`` the language it is written in."""

    group: str
    language: str
    prompt: str
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Check:
    """One row of the acceptance table."""

    title: str
    total: int
    problems: list[str]

    @property
    def passed(self) -> int:
        return self.total - len(self.problems)


def load_prompts(path: Path = PROMPTS) -> dict[str, Any]:
    """The acceptance list: general, identity, greetings, conversations."""
    prompts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return prompts


def conversations(prompts: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """All conversations of the list: (group, language, the user's turns), in the order of the groups."""
    talks = [
        (group, language, [prompt])
        for group in ("general", "identity")
        for language, texts in prompts[group].items()
        for prompt in texts
    ]
    talks += [("greetings", greeting["language"], [greeting["prompt"]]) for greeting in prompts["greetings"]]
    talks += [("conversations", language, turns) for language, turns in prompts["conversations"].items()]
    return talks


def load_greedy(model: str, max_new_tokens: int = MAX_NEW_TOKENS) -> Session:
    """A greedy chat session. Raises UserError if there is no such model."""
    from xverse.chat.session import load_session
    from xverse.log import notice

    return load_session(model, {"temperature": 0.0, "max_new_tokens": max_new_tokens}, notify=notice)


def collect(session: Session, talks: Iterable[tuple[str, str, list[str]]]) -> list[Reply]:
    """The replies to every turn of ``talks``. All run in one batch, turn after turn."""
    talks = list(talks)
    history: list[list[dict[str, str]]] = [[] for _ in talks]
    replies: list[list[Reply]] = [[] for _ in talks]
    for turn in range(max(len(turns) for _, _, turns in talks)):
        going = [index for index, (_, _, turns) in enumerate(talks) if turn < len(turns)]
        for index in going:
            history[index].append({"role": "user", "content": talks[index][2][turn]})
        answers = _generate(session, [history[index] for index in going])
        for index, (text, reason) in zip(going, answers, strict=True):
            group, language, turns = talks[index]
            history[index].append({"role": "assistant", "content": text})
            replies[index].append(Reply(group, language, turns[turn], text, reason))
    return [reply for talk in replies for reply in talk]


def _generate(
    session: Session, conversations: Sequence[list[dict[str, str]]]
) -> list[tuple[str, str | None]]:
    from xverse.engine import Request
    from xverse.tokenizer import encode_chat

    config = session.engine.model.config
    handles = []
    for messages in conversations:
        prompt = encode_chat(
            session.engine.tokenizer,
            messages,
            max_new_tokens=session.sampling.max_new_tokens,
            max_positions=config.max_position_embeddings,
            truncation=config.max_tokenizer_truncation,
        )
        request = Request(prompt_ids=prompt.ids, sampling=session.sampling, stop_ids=session.stop_ids)
        handles.append(session.engine.submit(request))
    texts = dict.fromkeys(handles, "")
    reasons: dict[int, str | None] = dict.fromkeys(handles)
    while session.engine.busy:
        for event in session.engine.step():
            texts[event.handle] += event.text
            reasons[event.handle] = event.finish_reason
    return [(texts[handle], reasons[handle]) for handle in handles]


def problem(reply: Reply) -> str | None:
    """Why the reply fails the acceptance list, or None."""
    reason = unfinished(reply.text, reply.finish_reason) or repeated_line(reply.text) or role_text(reply.text)
    if reason is None and reply.group == "identity" and NAME not in reply.text:
        reason = f"does not name {NAME}"
    if reason is None and reply.group == "greetings":
        reason = wrong_language(reply.text, reply.language)
    return reason


def size_problems(path: Path, parameters: int) -> list[str]:
    """Problems with the embedded model's size: its parameters, and its files in git."""
    problems = []
    if parameters != PARAMETERS:
        problems.append(f"{parameters:,} parameters, not {PARAMETERS:,}")
    size = directory_bytes(path)
    if size > MOST_BYTES:
        problems.append(f"{path}: {size:,} bytes, more than {MOST_BYTES:,}")
    return problems


def directory_bytes(path: Path) -> int:
    """The size of a model directory's files; a run's checkpoints are in folders and do not count."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def checks(replies: Sequence[Reply], sizes: list[str]) -> list[Check]:
    """The rows of the acceptance table; ``sizes`` comes from ``size_problems``."""
    rows = []
    for group, title in TITLES.items():
        members = [reply for reply in replies if reply.group == group]
        problems = [f"{reply.prompt!r}: {text}" for reply in members if (text := problem(reply))]
        rows.append(Check(title, len(members), problems))
    repeated = [f"{reply.prompt!r}: {text}" for reply in replies if (text := repeated_line(reply.text))]
    rows.append(Check(f"No line more than {LINE_AT_MOST} times", len(replies), repeated))
    rows.append(Check(f"{PARAMETERS:,} parameters; at most {MOST_BYTES // 10**6} MB", 2, sizes))
    return rows


def as_text(rows: Sequence[Check], replies: Sequence[Reply]) -> str:
    """Table and replies for a terminal."""
    lines = []
    for row in rows:
        lines.append(f"{'FAIL' if row.problems else 'ok':4}  {row.passed:3} of {row.total:3}  {row.title}")
        lines += [f"      {text}" for text in row.problems]
    for group in TITLES:
        lines += ["", f"== {group}"]
        for reply in (reply for reply in replies if reply.group == group):
            lines += [f"{'!' if problem(reply) else ' '} > {reply.prompt}", reply.text]
    return "\n".join(lines) + "\n"


def as_markdown(rows: Sequence[Check], replies: Sequence[Reply]) -> str:
    """Table and replies for a model card. Replies are in code blocks, which show them unchanged."""
    lines = ["| Check | Passed |", "|---|---|"]
    lines += [f"| {row.title} | {row.passed} of {row.total} |" for row in rows]
    for row in rows:
        if row.problems:
            lines += ["", f"{row.title}, failed:", "", *(f"- {text}" for text in row.problems)]
    for group, title in TITLES.items():
        members = [reply for reply in replies if reply.group == group]
        lines += ["", f"### {title}", "", f"{len(members)} greedy replies, unedited."]
        for reply in members:
            longest = max((len(run) for run in re.findall("`+", reply.text)), default=0)
            fence = "`" * max(3, longest + 1)
            lines += ["", f"**{reply.prompt}**", "", f"{fence}text", reply.text, fence]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("accept", lambda: _accept(arguments))


def _accept(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="accept.py", description="Check a model directory against the embedded model's list."
    )
    parser.add_argument("model", metavar="MODEL", help="model directory, or nano")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write table and replies as Markdown")
    parser.add_argument(
        "--max-new-tokens", type=whole(1), default=MAX_NEW_TOKENS, metavar="N", help="longest reply"
    )
    args = parser.parse_args(arguments)

    from xverse.files import atomic_file
    from xverse.formats import resolve

    session = load_greedy(args.model, args.max_new_tokens)
    replies = collect(session, conversations(load_prompts()))
    parameters = sum(tensor.numel() for tensor in session.engine.model.parameters())
    rows = checks(replies, size_problems(resolve(args.model), parameters))
    if args.markdown is not None:
        with atomic_file(args.markdown) as temporary:
            temporary.write_text(as_markdown(rows, replies), encoding="utf-8")
    sys.stdout.write(as_text(rows, replies))
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
