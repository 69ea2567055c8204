"""XVERSE's chat format as a Jinja template, for programs that tokenise the rendered text (see chat.py)."""

from __future__ import annotations

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and not loop.first -%}"
    "{{- raise_exception('a system message must be the first one') -}}"
    "{%- elif message['role'] == 'system' -%}{{- 'Human: ' + message['content'] + '\\n' -}}"
    "{%- elif message['role'] == 'user' -%}{{- 'Human: ' + message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'exec' -%}{{- 'Exec: ' + message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- 'Assistant: ' + message['content'] + '<|endoftext|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
)
