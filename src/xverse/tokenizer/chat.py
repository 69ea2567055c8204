"""XVERSE's chat format, as ids and as a Jinja template.

    Human: {user}\n\nAssistant: {assistant}<|endoftext|>Human: {user}\n\nAssistant:␠

As in upstream's ``chat``, role prefixes and contents are tokenised separately and concatenated. So the first
word of a turn has no ``▁``, and no text can spell an end marker. Programs that tokenise the text rendered by
the template get the same text with other ids: the space of a prefix joins the word that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xverse.config import UserError, check_keys, nearest
from xverse.tokenizer.template import template_dialogue, template_ids
from xverse.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

PREFIXES = {"system": "Human: ", "user": "Human: ", "exec": "Exec: ", "assistant": "Assistant: "}
SUFFIXES = {"system": "\n", "user": "\n\n", "exec": "\n\n", "assistant": SPECIAL_TOKENS[3]}
_KEYS = ("role", "content")


@dataclass(frozen=True)
class ChatPrompt:
    """``ids`` end after "Assistant: "; the other fields count what truncation removed."""

    ids: list[int]
    dropped_rounds: int = 0
    cut_tokens: int = 0


def input_limit(max_new_tokens: int, max_positions: int = 8192, truncation: int = 6144) -> int:
    """The maximum prompt length in tokens: leaves room for the reply, but is at least half of the
    positions."""
    return min(max(max_positions - max_new_tokens, max_positions // 2), truncation)


def check_messages(messages: Sequence[Mapping[str, Any]], *, last: Sequence[str]) -> None:
    """Raise UserError, naming the message, for wrong roles, order, keys or contents of training data.

    A dialogue is an optional system message, then user or exec alternating with assistant; it starts with
    user, and its last role is one of ``last``.
    """
    _check_list(messages)
    previous = ""
    for index, message in enumerate(messages):
        where, role = f"messages[{index}]", message["role"]
        if role == "system" and index:
            raise UserError(f"{where}: a system message must be the first one")
        if previous in ("", "system") and role not in ("system", "user"):
            raise UserError(f"{where}: role '{role}' cannot begin the conversation; the first turn is 'user'")
        if previous in ("user", "exec") and role != "assistant":
            raise UserError(f"{where}: role '{role}' cannot follow '{previous}'; 'assistant' must")
        if previous == "assistant" and role == "assistant":
            raise UserError(f"{where}: role 'assistant' cannot follow 'assistant'; 'user' or 'exec' must")
        previous = role
    if previous not in last:
        allowed = " or ".join(f"'{role}'" for role in last)
        raise UserError(f"messages[{len(messages) - 1}]: the last role must be {allowed}, not '{previous}'")


def _check_list(messages: Any) -> None:
    """Raise UserError, naming the message, for what is not a list of messages of known roles."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(f"messages: expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise UserError("messages: the list is empty; it needs at least one message")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected a mapping with role and content, found {type(message).__name__}")
    check_keys(message, _KEYS, where)
    for key in _KEYS:
        if key not in message:
            raise UserError(f"{where}: missing key '{key}'")
        if not isinstance(message[key], str):
            raise UserError(f"{where}: {key} must be text, found {type(message[key]).__name__}")
    if message["role"] not in PREFIXES:
        role = message["role"]
        raise UserError(
            f"{where}: unknown role '{role}'{nearest(role, PREFIXES)} (known: {', '.join(PREFIXES)})"
        )


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    max_positions: int = 8192,
    truncation: int = 6144,
    continue_last: bool = False,
) -> ChatPrompt:
    """The prompt for the next assistant turn, within ``input_limit``.

    Roles may come in any order, each message is written in its place, and empty system messages are omitted:
    programs keep windows of conversations, greet first, or add instructions later. With ``continue_last`` the
    prompt ends within the last message if that is the assistant's, so that the reply continues it.

    Oldest rounds are dropped first. If the last round alone is too long, it is truncated on the right, its
    two line ends included, as upstream does. The system message is kept, where upstream drops it with the
    first round; it is truncated to half of the limit.

    Raises UserError, naming the message, for unknown roles and keys and for contents that are not text.
    """
    _check_list(messages)
    limit = input_limit(max_new_tokens, max_positions, truncation)
    if tokenizer.template is not None:
        return _template_prompt(tokenizer, messages, limit)
    system, rounds = _rounds(tokenizer, messages)
    prompt = tokenizer.encode(PREFIXES["assistant"])
    if continue_last and messages[-1]["role"] == "assistant":
        rounds[-1].pop()  # the end of the message
        prompt = []
    if limit <= len(prompt):
        raise UserError(f"a prompt limit of {limit} tokens leaves no room for a message")
    cut = max(0, len(system) - min(limit // 2, limit - len(prompt)))
    system = system[: len(system) - cut]
    last = rounds.pop() if rounds else []
    budget = limit - len(system) - len(prompt)
    cut += max(0, len(last) - budget)
    last = last[:budget]
    kept: list[int] = []
    room = budget - len(last)
    while rounds and len(kept) + len(rounds[-1]) <= room:
        kept = rounds.pop() + kept
    return ChatPrompt(system + kept + last + prompt, dropped_rounds=len(rounds), cut_tokens=cut)


def _template_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], limit: int) -> ChatPrompt:
    """The prompt in a model's own template, without the oldest rounds that exceed the limit. Raises UserError
    where the last turn alone exceeds it."""
    turns = _template_roles(messages)
    system = turns[:1] if turns[0]["role"] == "system" else []
    starts = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    for dropped, start in enumerate(starts):
        ids = template_ids(tokenizer, [*system, *turns[start:]])
        if len(ids) <= limit:
            return ChatPrompt(ids, dropped_rounds=dropped)
    raise UserError(f"messages: the last one is longer than the {limit} tokens that a prompt may have")


def _template_roles(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the roles that templates know: the result of a tool call is the user's."""
    return [{**m, "role": "user" if m["role"] == "exec" else m["role"]} for m in messages]


def encode_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], last_only: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids of a whole dialogue for training, and its loss mask: assistant content and EOS have loss, with
    ``last_only`` those of the last reply.

    Nothing is truncated. A model's own template is used where it has one, see ``template_dialogue``. Raises
    UserError for messages that ``check_messages`` refuses; the last must be assistant.
    """
    check_messages(messages, last=("assistant",))
    if tokenizer.template is not None:
        return template_dialogue(tokenizer, _template_roles(messages), last_only)
    ids: list[int] = []
    mask: list[bool] = []
    for index, message in enumerate(messages):
        prefix, content = message_ids(tokenizer, message)
        learned = message["role"] == "assistant" and (not last_only or index + 1 == len(messages))
        ids += prefix + content
        mask += [False] * len(prefix) + [learned] * len(content)
    return ids, mask


def message_ids(tokenizer: Tokenizer, message: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The ids of the role's prefix, and those of the content with its end."""
    role, content = message["role"], message["content"]
    prefix = tokenizer.encode(PREFIXES[role])
    if role == "assistant":
        return prefix, [*tokenizer.encode(content), tokenizer.eos_id]
    return prefix, tokenizer.encode(content + SUFFIXES[role])


def _rounds(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[list[int]]]:
    """The ids of the system messages at the beginning, and of each round: turns up to the assistant's."""
    system: list[int] = []
    rounds: list[list[int]] = []
    answered = True
    for message in messages:
        role = message["role"]
        if role == "system" and not message["content"]:
            continue
        prefix, content = message_ids(tokenizer, message)
        if role == "system" and not rounds:
            system += prefix + content
        elif answered and (role != "assistant" or not rounds):
            rounds.append(prefix + content)
        else:
            rounds[-1] += prefix + content
        answered = role == "assistant" or not rounds
    return system, rounds
