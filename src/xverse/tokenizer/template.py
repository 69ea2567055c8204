"""Conversations in the chat format that a model brings as a Jinja template."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from xverse.config import UserError
from xverse.tokenizer.tokenizer import Tokenizer

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

    def refuse(text: str) -> str:
        raise jinja2.TemplateError(text)

    def as_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # The whitespace settings and names of transformers, so that a template renders alike in both.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    steps = 0

    def counted_range(*bounds: int) -> range:
        """What nested loops run over, together, is bounded; the sandbox bounds each range alone."""
        nonlocal steps
        numbers = jinja2.sandbox.safe_range(*bounds)
        steps += 1 + len(numbers)
        if steps > _MOST_STEPS:
            raise jinja2.TemplateError("loops without an end")
        return numbers

    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime, "range": counted_range}
    environment.filters["tojson"] = as_json
    # Only training uses these marks.
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    pieces, size, end = [], 0, time.monotonic() + _DEADLINE
    try:
        for piece in environment.from_string(template).generate(
            messages=messages, add_generation_prompt=add_generation_prompt, **values
        ):
            pieces.append(piece)
            size += len(piece)
            if size > _LONGEST or time.monotonic() > end:
                raise UserError("chat template: writes without an end")
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(f"chat template: {' '.join(str(error).split())[:300]}") from error
    return "".join(pieces)


def template_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation in the tokenizer's template. Special tokens are those of the template; what a
    message spells like one stays text. Raises UserError as ``render`` does."""
    assert tokenizer.template is not None
    special = [tokenizer.token_bytes(index).decode() for index in sorted(tokenizer.special_ids)]
    spelled = re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)))
    plain: list[str] = []

    def hide(text: str) -> str:
        def mark(match: re.Match[str]) -> str:
            plain.append(match[0])
            return f"{_OPEN}{len(plain) - 1}{_CLOSE}"

        return spelled.sub(mark, text) if special else text

    hidden = [{**message, "content": hide(message["content"])} for message in messages]
    names = {
        name: tokenizer.token_bytes(index).decode() if index >= 0 else ""
        for name, index in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
    }
    text = render(
        tokenizer.template,
        hidden,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        **names,
    )
    if not plain:
        return tokenizer.encode(text, allow_special=True)
    ids: list[int] = []
    for number, part in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", text)):
        ids += (
            tokenizer.encode(plain[int(part)]) if number % 2 else tokenizer.encode(part, allow_special=True)
        )
    return ids
