"""Conversations in the chat format that a model brings as a Jinja template."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from xverse.config import UserError
from xverse.tokenizer.tokenizer import Tokenizer, replace_surrogates

_LONGEST = 1 << 24  # characters that a template may write
_DEADLINE = 5.0  # seconds that it may take
_MOST_STEPS = 1_000_000  # of all its ranges together
# Stand for the special tokens that a message spells, so that they stay text: private-use characters.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **values: Any
) -> str:
    """Render a chat template, in Jinja's sandbox because templates may be untrusted.

    ``values`` are what templates may use besides: ``bos_token``, ``eos_token``, ``tools`` and others. Raises
    UserError where the template refuses the messages, is ill-formed, does what the sandbox forbids, or writes
    or works without an end.
    """
    import jinja2
    import jinja2.sandbox

    steps = 0

    def counted_range(*bounds: int) -> range:
        """What nested loops run over, together, is bounded; the sandbox bounds each range alone."""
        nonlocal steps
        numbers = jinja2.sandbox.safe_range(*bounds)
        steps += 1 + len(numbers)
        if steps > _MOST_STEPS:
            raise jinja2.TemplateError("loops without an end")
        return numbers

    values |= {"messages": messages, "add_generation_prompt": add_generation_prompt, "range": counted_range}
    pieces, size, end = [], 0, time.monotonic() + _DEADLINE
    try:
        for piece in _compiled(template).generate(**values):
            pieces.append(piece)
            size += len(piece)
            if size > _LONGEST or time.monotonic() > end:
                raise UserError("chat template: writes without an end")
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(f"chat template: {' '.join(str(error).split())[:300]}") from error
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template with the whitespace settings and names of transformers, so that it renders alike in both.
    Training renders it several times for each dialogue."""
    import jinja2
    import jinja2.sandbox

    def refuse(text: str) -> str:
        raise jinja2.TemplateError(text)

    def as_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    environment.filters["tojson"] = as_json
    # Only training elsewhere uses these marks.
    return environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))


class _Conversation:
    """Messages in the tokenizer's template. What a message spells like a special token is marked while the
    template renders, so that it stays text; those that the template writes are special."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> None:
        self._tokenizer = tokenizer
        special = [tokenizer.token_bytes(index).decode() for index in sorted(tokenizer.special_ids)]
        hidden = sorted([*special, _OPEN], key=len, reverse=True)
        spelled = re.compile("|".join(re.escape(text) for text in hidden if text))
        self._plain: list[str] = []

        def mark(match: re.Match[str]) -> str:
            self._plain.append(match[0])
            return f"{_OPEN}{len(self._plain) - 1}{_CLOSE}"

        self._messages = [
            {**message, "content": spelled.sub(mark, message["content"])} for message in messages
        ]
        self._names = {
            name: tokenizer.token_bytes(index).decode() if index >= 0 else ""
            for name, index in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        }

    def text(self, count: int, add_generation_prompt: bool = False) -> str:
        """The first ``count`` messages as the template writes them."""
        assert self._tokenizer.template is not None
        return render(
            self._tokenizer.template,
            self._messages[:count],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **self._names,
        )

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a rendered ``text``, and for each the place in it where the token ends."""
        ids: list[int] = []
        ends: list[int] = []
        place = 0
        bos = self._names["bos_token"]
        if self._tokenizer.bos_apart and bos and text.startswith(bos):
            ids, ends, place = [self._tokenizer.bos_id], [len(bos)], len(bos)
            text = text[len(bos) :]
        for number, part in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", text)):
            if number % 2:
                place += len(_OPEN) + len(part) + len(_CLOSE)
                plain = self._tokenizer.encode(self._plain[int(part)])
                ids += plain
                ends += [place] * len(plain)
            elif part:
                encoding = self._tokenizer.backend.encode(replace_surrogates(part), add_special_tokens=False)
                ids += encoding.ids
                ends += [place + end for _, end in encoding.offsets]
                place += len(part)
        return ids, ends


def template_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation in the tokenizer's template. Special tokens are those of the template; what a
    message spells like one stays text. Raises UserError as ``render`` does."""
    conversation = _Conversation(tokenizer, messages)
    ids = conversation.encode(conversation.text(len(messages), add_generation_prompt))[0]
    if not ids:
        raise UserError("chat template: writes nothing about this conversation")
    return ids


def template_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], last_only: bool = False
) -> tuple[list[int], list[bool]]:
    """The ids of a dialogue in the tokenizer's template, and its loss mask.

    Loss have the tokens that follow the prompt of a reply, up to the last special token that the template
    writes after it, such as ``<|im_end|>``; if it writes none after the last reply, the end of text is
    appended. With ``last_only`` the last reply alone has loss. A template writes a reply where the messages
    before it, with the prompt for a reply, are the beginning of the whole text. Raises UserError for one that
    does not, such as those that write earlier replies differently once others follow, and as ``render`` does.
    """
    conversation = _Conversation(tokenizer, messages)
    text = conversation.text(len(messages))
    ids, ends = conversation.encode(text)
    mask = [False] * len(ids)
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index in replies[-1:] if last_only else replies:
        last = index + 1 == len(messages)
        prompt = conversation.text(index, add_generation_prompt=True)
        whole = text if last else conversation.text(index + 1)
        if not (text.startswith(whole) and whole.startswith(prompt)):
            advice = (
                "; set mask_history to train on the last reply only"
                if not last_only and len(replies) > 1
                else ""
            )
            raise UserError(
                "chat template: what it writes for a reply does not continue what it writes to prompt for "
                f"one, so that the tokens with loss are unknown{advice}"
            )
        reply = [place for place, end in enumerate(ends) if len(prompt) < end <= len(whole)]
        special = [place for place in reply if ids[place] in tokenizer.special_ids]
        stop = special[-1] if special else len(ids)
        for place in reply:
            mask[place] = place <= stop
        if last and not special and tokenizer.eos_id >= 0:
            ids, mask = [*ids, tokenizer.eos_id], [*mask, True]
    return ids, mask
