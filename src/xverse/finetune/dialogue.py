"""Dialogues to token ids and loss masks within a length, in XVERSE's chat format or the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from xverse.config import UserError
from xverse.tokenizer import Tokenizer, encode_dialogue
from xverse.tokenizer.chat import message_ids

_QUESTION, _BOTH = "had the last question cut", "had question and answer cut"


def encode_within(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], length: int, last_only: bool = False
) -> tuple[list[int], list[bool], str]:
    """A dialogue of at most ``length`` tokens as ids and loss mask, and what was cut (empty: nothing). With
    ``last_only`` the last reply alone has loss.

    Cut in this order: the oldest rounds, as in chat; the end of the last question; the system message; the
    end of the last reply, which then has no end marker either.
    """
    if tokenizer.template is not None:
        return _fit_template(tokenizer, messages, length, last_only)
    learned = [message["role"] == "assistant" for message in messages]
    if last_only:
        learned[:-1] = [False] * (len(learned) - 1)
    pairs = zip(messages, learned, strict=True)
    return _fit(
        [_Part(one["role"], *message_ids(tokenizer, one), has_loss) for one, has_loss in pairs], length
    )


def _fit_template(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], length: int, last_only: bool
) -> tuple[list[int], list[bool], str]:
    """A template writes what it wants around messages, so it renders again after each cut."""
    ids, mask = encode_dialogue(tokenizer, messages, last_only)
    if len(ids) <= length:
        return ids, mask, ""
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])
    while len(turns) > 2:
        turns = turns[2:]
        ids, mask = encode_dialogue(tokenizer, [*system, *turns], last_only)
        if len(ids) <= length:
            return ids, mask, "lost their oldest rounds"
    question, reply = turns
    for before, what in ((system, _QUESTION), ([], _BOTH)):
        kept = tokenizer.encode(question["content"])
        while len(ids) > length and len(kept) > 1:
            kept = kept[: max(1, len(kept) - (len(ids) - length))]
            shorter = {**question, "content": tokenizer.decode(kept, skip_special=False).rstrip("\ufffd")}
            ids, mask = encode_dialogue(tokenizer, [*before, shorter, reply], last_only)
        if len(ids) <= length:
            return ids, mask, what
        if before:
            ids, mask = encode_dialogue(tokenizer, [question, reply], last_only)
    if not any(mask[:length]):
        raise UserError(f"cutoff_len {length} leaves no room for a reply")
    return ids[:length], mask[:length], _BOTH


@dataclass(frozen=True)
class _Part:
    """A message as ids: its role's prefix, and the content with its end, which may have loss."""

    role: str
    prefix: list[int]
    content: list[int]
    learned: bool


def _fit(parts: Sequence[_Part], length: int) -> tuple[list[int], list[bool], str]:
    ids, mask = _join(parts)
    if len(ids) <= length:
        return ids, mask, ""
    system = list(parts[:1]) if parts[0].role == "system" else []
    turns = list(parts[len(system) :])
    while len(turns) > 2:
        turns = turns[2:]
        ids, mask = _join([*system, *turns])
        if len(ids) <= length:
            return ids, mask, "lost their oldest rounds"
    question, reply = turns
    before = [token for part in system for token in (*part.prefix, *part.content)]
    room = length - len(before) - len(question.prefix) - len(reply.prefix) - len(reply.content)
    if room < 1:
        room += len(before)
        before = []
    prompt = before + question.prefix + question.content[: max(1, room)] + reply.prefix
    kept = reply.content[: length - len(prompt)]
    if not kept:
        raise UserError(f"cutoff_len {length} leaves no room for a reply")
    what = _QUESTION if room >= 1 else _BOTH
    return prompt + kept, [False] * len(prompt) + [True] * len(kept), what


def _join(parts: Iterable[_Part]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for part in parts:
        ids += part.prefix + part.content
        mask += [False] * len(part.prefix) + [part.learned] * len(part.content)
    return ids, mask
