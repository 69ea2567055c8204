"""Chat formats that publishers describe in code or papers only, as Jinja templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# FastChat's conversation.py, "vicuna_v1.1": versions 1.1 to 1.5.
VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% else %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user\\'s questions. ' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% elif not loop.first %}{{ raise_exception('a system message must be the first one') }}{% endif %}"
    "{% endfor %}"
)


def published_template(values: Mapping[str, Any], directory: Path) -> str | None:
    """The chat template of a model that has none in its files, from the names of its configuration and of the
    last three parts of its path (which contain the name in the hub's cache too); None if it is not known."""
    names = [str(values.get("_name_or_path", "")), *directory.absolute().parts[-3:]]
    return VICUNA if any("vicuna" in name.lower() for name in names) else None
