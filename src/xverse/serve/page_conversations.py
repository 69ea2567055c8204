"""The conversations of the page: handlers of its buttons, and the data in the browser's storage.

``saved`` is that data: "chats", a list of {"id", "messages"}, latest first; "at", the id of the chat that is
shown, or None; "language", ``zh`` or ``en``, or None for the browser's language.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import gradio as gr

from xverse.serve.page_texts import LANGUAGES, Texts

MOST_CONVERSATIONS = 50  # browsers store about 5 MB per site
Messages = list[dict[str, str]]


def say(text: str, history: Messages) -> tuple[str, Messages]:
    if not text.strip():
        return "", plain(history)
    return "", [*plain(history), {"role": "user", "content": text}]


def example(chosen: gr.SelectData) -> Messages:
    return [{"role": "user", "content": chosen.value["text"]}]


def again(history: Messages, chosen: gr.RetryData) -> Messages:
    return plain(history)[: _index(chosen.index) + 1]


def edited(history: Messages, chosen: gr.EditData) -> Messages:
    """The conversation up to and including the edited message; later messages answered the old one."""
    before = plain(history)[: _index(chosen.index)]
    return [*before, {"role": "user", "content": str(chosen.value)}]


def _index(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]


def nothing_saved() -> dict[str, Any]:
    return {"chats": [], "at": None, "language": None}


def store(saved: dict[str, Any], history: Messages, language: str) -> tuple[dict[str, Any], Any]:
    """Store the conversation that is shown."""
    history = plain(history)
    if history:
        chats = [chat for chat in saved["chats"] if chat["id"] != saved["at"]]
        name = saved["at"] or uuid.uuid4().hex
        chats.insert(0, {"id": name, "messages": history})
        saved = {**saved, "chats": chats[:MOST_CONVERSATIONS], "at": name}
    return saved, listed(saved, language)


def leave(saved: dict[str, Any], history: Messages, language: str) -> tuple[Any, ...]:
    saved, _ = store(saved, history, language)
    saved = {**saved, "at": None}
    return saved, listed(saved, language), [], ""


def choose(saved: dict[str, Any], history: Messages, language: str, chosen: str) -> tuple[Any, ...]:
    saved, _ = store(saved, history, language)
    saved = {**saved, "at": chosen}
    chat = current(saved)
    return saved, listed(saved, language), chat["messages"] if chat else [], ""


def delete(saved: dict[str, Any], language: str) -> tuple[Any, ...]:
    chats = [chat for chat in saved["chats"] if chat["id"] != saved["at"]]
    saved = {**saved, "chats": chats, "at": None}
    return saved, listed(saved, language), [], ""


def current(saved: dict[str, Any]) -> dict[str, Any] | None:
    return next((chat for chat in saved["chats"] if chat["id"] == saved["at"]), None)


def listed(saved: dict[str, Any], language: str) -> Any:
    choices = [(_title(chat["messages"], LANGUAGES[language]), chat["id"]) for chat in saved["chats"]]
    return gr.update(choices=choices, value=saved["at"])


def _title(messages: Messages, texts: Texts) -> str:
    text = " ".join(messages[0]["content"].split()) if messages else ""
    return (text[:24] + "…" if len(text) > 24 else text) or texts.untitled


def plain(history: Sequence[Any]) -> Messages:
    """Gradio's messages reduced to role and text."""
    messages = []
    for message in history:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        messages.append({"role": message["role"], "content": content})
    return messages
