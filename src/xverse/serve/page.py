"""The web page at ``/``: conversations, and plain continuation of a text. Gradio draws it; what is generated
goes through the same service as the API's requests, with the same limits."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr
from fastapi import FastAPI

from xverse.config import UserError
from xverse.engine import Request
from xverse.engine.load import COMPLETION, Parameters
from xverse.serve import conversations
from xverse.serve.conversations import Messages
from xverse.serve.errors import ApiError
from xverse.serve.protocol import ChatRequest, CompletionRequest, Message
from xverse.serve.replies import Choice, events
from xverse.serve.runner import Busy, Draining
from xverse.serve.service import Service
from xverse.serve.turns import (
    AFTER_REPLY,
    ENDING_REPLY,
    OVER,
    QUIET,
    WIDTH,
    Replies,
    Step,
    end_turn,
    follow,
    until_ending,
)
from xverse.serve.words import LANGUAGES, Words, preferred

_NARROW = 800  # pixels
_LEAST_ROOM = 256  # tokens for a reply, before old messages are left out for it
_IDLE_PAUSE = 0.08  # seconds
_PAUSE = 0.05  # seconds between two looks at a reply: more would be work that nobody sees
_MATHS: list[dict[str, str | bool]] = [
    {"left": left, "right": right, "display": display}  # no single $: it mostly means money
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))
]
_CSS = """
.gradio-container { max-width: 100% !important; }
#chat { height: calc(100dvh - 15.5rem) !important; min-height: 16rem; }
#status { min-height: 1.5rem; opacity: 0.7; font-size: 0.85rem; }
#conversations label { width: 100%; }
#conversations span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
@media (max-width: 640px) {
  .gradio-container main.fillable { padding: 0.5rem !important; }
  #chat { height: calc(100dvh - 14rem) !important; }
}
"""


def mount(app: FastAPI, service: Service, *, first: str = "chat") -> None:
    """Put the page at ``/`` of ``app``, behind its other routes; ``first`` is the tab that opens."""
    gr.mount_gradio_app(
        app,
        _blocks(service, first),
        path="/",
        theme=gr.themes.Default(
            font=["system-ui", "Noto Sans CJK SC", "Noto Sans SC", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css=_CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        max_file_size="1b",  # nothing is to be uploaded
    )


def _blocks(service: Service, first: str) -> gr.Blocks:
    # Gradio would keep 10,000 events and make a table of them after each.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    blocks = gr.Blocks(title=service.name, analytics_enabled=False, fill_height=True)
    blocks.queue(default_concurrency_limit=None, max_size=service.runner.most, api_open=False)
    # It looks for work a thousand times a second, which costs an idle server 5 % of a core.
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = _IDLE_PAUSE
    with blocks:
        page = _Page(service, first)
        page.connect(blocks)
    return blocks


class _Page:
    """The components, and what happens when they are used."""

    def __init__(self, service: Service, first: str) -> None:
        self._service = service
        self._answers = Replies()
        self._continuations = Replies()
        words = LANGUAGES["en"]
        # The secret keeps nothing secret: with a random one a restart would lose what browsers hold.
        self.saved = gr.BrowserState(conversations.nothing_saved(), storage_key="xverse", secret="xverse")
        self.width = gr.Number(visible=False)  # of the window
        self.chosen = gr.Textbox(visible=False)  # a conversation, while a reply ends
        with gr.Sidebar(width=290, open=False) as self.sidebar:
            self.language = gr.Radio(
                [("中文", "zh"), ("English", "en")], value="en", container=False, elem_id="language"
            )
            self.new = gr.Button(words.new, variant="primary", elem_id="new")
            self.conversations = gr.Radio(
                [], label=words.conversations, info=words.nothing, elem_id="conversations"
            )
            self.delete = gr.Button(words.delete, size="sm", elem_id="delete")
            with gr.Row():
                self.delete_surely = gr.Button(
                    words.delete_surely, size="sm", variant="stop", visible=False, elem_id="delete-surely"
                )
                self.keep = gr.Button(words.keep, size="sm", visible=False)
        with gr.Tabs(selected=first):
            with gr.Tab(words.chat, id="chat") as self.chat_tab:
                self.chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    container=False,
                    editable="user",
                    latex_delimiters=_MATHS,
                    buttons=["copy", "copy_all"],
                    allow_tags=False,
                    layout="bubble",
                )
                self.status = gr.Markdown("", elem_id="status")
                self.message = gr.Textbox(
                    show_label=False,
                    container=False,
                    max_lines=8,
                    submit_btn=True,
                    autofocus=True,
                    elem_id="message",
                )
                with gr.Accordion(words.sampling, open=False) as self.chat_settings:
                    self.system = gr.Textbox("", label=words.system, lines=2, elem_id="system")
                    self.chat_sliders = _sliders(service.parameters, service.context)
            with gr.Tab(words.generation, id="generation") as self.text_tab:
                self.text = gr.Textbox("", lines=14, max_lines=30, label=words.prompt, elem_id="text")
                self.text_status = gr.Markdown("", elem_id="text-status")
                with gr.Row():
                    self.go_on = gr.Button(words.go_on, variant="primary", elem_id="go-on")
                    self.stop = gr.Button(words.stop, elem_id="stop")
                with gr.Accordion(words.sampling, open=False) as self.text_settings:
                    self.text_sliders = _sliders(COMPLETION, service.context)

    def connect(self, blocks: gr.Blocks) -> None:
        """Say what each event does."""
        spoken = [self.chat, self.system, self.language, *self.chat_sliders]
        shown = [self.chat, self.status]
        kept = [self.saved, self.chat]
        listed = [self.saved, self.conversations]
        at = [*kept, self.language]
        store: Step = (conversations.store, at, listed)
        box = self.message

        begun = [
            follow(
                box.submit(None, None, None, js=AFTER_REPLY, queue=False, **QUIET),
                (conversations.say, [box, self.chat], [box, self.chat]),
            ),
            # These need what their event says, which the first step alone is told. What they read of the page
            # before they wait are messages above the running reply.
            self.chat.example_select(
                conversations.example, None, self.chat, js=ENDING_REPLY, queue=False, **QUIET
            ),
            self.chat.retry(conversations.again, self.chat, self.chat, js=ENDING_REPLY, queue=False, **QUIET),
            self.chat.edit(conversations.edited, self.chat, self.chat, js=ENDING_REPLY, queue=False, **QUIET),
        ]
        for event in begun:
            busy = follow(event, store, (_busy, None, box))
            busy.failure(None, None, None, js=OVER, queue=False, **QUIET)
            answer = busy.success(self._answer, spoken, shown, **QUIET)
            for ended in (answer.success, answer.failure):
                ready = ended(_ready, None, box, queue=False, **QUIET)
                end_turn(follow(ready, store))
        box.stop(self._answers.end, None, None, queue=False, **QUIET)

        left = [*listed, *shown]
        for begins, function, inputs in (
            (self.new.click, conversations.leave, at),
            (self.chat.clear, conversations.leave, at),
            (self.delete_surely.click, conversations.delete, [self.saved, self.language]),
        ):
            turn = begins(None, None, None, js=ENDING_REPLY, queue=False, **QUIET)
            end_turn(follow(turn, (function, inputs, left)))
        # When the reply has ended, the list shows its conversation as the chosen one again.
        turn = self.conversations.input(
            None, self.conversations, self.chosen, js=ENDING_REPLY, queue=False, **QUIET
        )
        end_turn(follow(turn, (conversations.choose, [*at, self.chosen], left)))
        asked = [self.delete, self.delete_surely, self.keep]
        self.delete.click(lambda: _visible(False, True, True), None, asked, queue=False, **QUIET)
        for button in (self.keep, self.delete_surely):
            button.click(lambda: _visible(True, False, False), None, asked, queue=False, **QUIET)

        written = [self.text, self.language, *self.text_sliders]
        self.go_on.click(self._continue, written, [self.text, self.text_status], **QUIET)
        self.stop.click(self._continuations.end, None, None, queue=False, **QUIET)

        translated = self._translated()
        captioned = self.language.input(
            lambda language: _captions(LANGUAGES[language]), self.language, translated, queue=False, **QUIET
        )
        turn = captioned.success(None, None, None, js=AFTER_REPLY, queue=False, **QUIET)
        end_turn(follow(turn, (_speak, [self.saved, self.language], self.saved)))
        turn = blocks.load(None, None, self.width, js=WIDTH, queue=False, **QUIET)
        opened = [self.sidebar, self.language, *translated, self.conversations, self.chat]
        end_turn(follow(turn, (_open, [self.saved, self.width], opened)))

    def _translated(self) -> list[Any]:
        """The components that ``_captions`` has words for, in its order."""
        return [
            self.new,
            self.conversations,
            self.delete,
            self.delete_surely,
            self.keep,
            self.chat_tab,
            self.text_tab,
            self.chat,
            self.message,
            self.system,
            self.text,
            self.go_on,
            self.stop,
            self.chat_settings,
            self.text_settings,
            *self.chat_sliders,
            *self.text_sliders,
        ]

    async def _answer(
        self,
        history: Messages,
        system: str,
        language: str,
        temperature: float,
        top_p: float,
        top_k: float,
        repetition_penalty: float,
        max_tokens: float,
        window: gr.Request,
    ) -> AsyncGenerator[tuple[Messages, str], None]:
        """``history`` with the reply to its last message, as it grows, until it is ended."""
        words = LANGUAGES[language]
        history = conversations.plain(history)
        if not history or history[-1]["role"] != "user":  # an empty message was sent
            return
        asked = ChatRequest(
            messages=_messages(system, history),
            temperature=float(temperature),
            top_p=float(top_p),
            top_k=int(top_k),
            repetition_penalty=float(repetition_penalty),
        )
        with self._answers.begin(window) as ending:
            try:
                request, dropped = await asyncio.to_thread(self._fitting, asked, int(max_tokens))
            except (ApiError, UserError) as error:
                raise gr.Error(str(error)) from None
            if dropped:
                gr.Info(words.forgotten)
            async with aclosing(self._stream(request, words, ending)) as found:
                async for text, status in found:
                    yield [*history, {"role": "assistant", "content": text}], status

    def _fitting(self, asked: ChatRequest, max_tokens: int) -> tuple[Request, int]:
        """An engine request, and how many of the oldest messages had to be left out for it. Raises ApiError
        where the last message alone is too long."""
        dropped = 0
        asked.max_tokens = min(max_tokens, _LEAST_ROOM)
        while True:
            try:
                (request,) = self._service.chat(asked)
                left = self._service.context - len(request.prompt_ids)
                return dataclasses.replace(request, max_new_tokens=min(max_tokens, left)), dropped
            except ApiError as error:
                begin = int(asked.messages[0].role == "system")
                if error.code != "context_length_exceeded" or len(asked.messages) - begin < 3:
                    raise
                del asked.messages[begin : begin + 2]
                dropped += 2

    async def _continue(
        self,
        text: str,
        language: str,
        temperature: float,
        top_p: float,
        top_k: float,
        repetition_penalty: float,
        max_tokens: float,
        window: gr.Request,
    ) -> AsyncGenerator[tuple[str, str], None]:
        """``text`` with its continuation, as it grows, until it is ended."""
        words = LANGUAGES[language]
        if not text:
            raise gr.Error(words.empty)
        asked = CompletionRequest(
            prompt=text,
            temperature=float(temperature),
            top_p=float(top_p),
            top_k=int(top_k),
            repetition_penalty=float(repetition_penalty),
            max_tokens=int(max_tokens),
        )
        with self._continuations.begin(window) as ending:
            try:
                (request,) = await asyncio.to_thread(self._service.complete, asked)
            except (ApiError, UserError) as error:
                raise gr.Error(str(error)) from None
            async with aclosing(self._stream(request, words, ending)) as found:
                async for more, status in found:
                    yield text + more, status

    async def _stream(
        self, request: Request, words: Words, ending: asyncio.Event
    ) -> AsyncGenerator[tuple[str, str], None]:
        """The text so far and the speed, twenty times a second and at the end, which may be ``ending``."""
        choice = Choice(0, request)
        begin = last = time.monotonic()

        def speed() -> str:
            rate = choice.tokens / max(time.monotonic() - begin, 1e-6)
            return words.speed.format(tokens=choice.tokens, rate=rate)

        try:
            async with (
                aclosing(events(self._service, "page", choice)) as found,
                aclosing(until_ending(ending, found)) as wanted,
            ):
                async for event in wanted:
                    now = time.monotonic()
                    if event.finish_reason is None and now - last < _PAUSE:
                        continue
                    last = now
                    yield choice.text, speed()
            if ending.is_set() and choice.text:
                yield choice.text, speed()
        except (ApiError, UserError, Busy, Draining) as error:
            raise gr.Error(str(error)) from None


def _sliders(parameters: Parameters, context: int) -> list[gr.Slider]:
    """In the order in which the answering functions take them."""
    words = LANGUAGES["en"]
    most = max(context - 1, 1)
    return [
        gr.Slider(0, 2, parameters.temperature, step=0.05, label=words.temperature),
        gr.Slider(0.05, 1, parameters.top_p, step=0.01, label=words.top_p),
        gr.Slider(0, 200, parameters.top_k, step=1, label=words.top_k),
        gr.Slider(1, 2, parameters.repetition_penalty, step=0.01, label=words.repetition_penalty),
        gr.Slider(1, most, min(parameters.max_new_tokens, most), step=1, label=words.max_tokens),
    ]


def _captions(words: Words) -> list[Any]:
    sliders = [
        gr.update(label=words.temperature, info=words.temperature_info),
        gr.update(label=words.top_p),
        gr.update(label=words.top_k),
        gr.update(label=words.repetition_penalty),
        gr.update(label=words.max_tokens),
    ]
    examples = [{"text": prompt, "display_text": skill} for skill, prompt in words.examples]
    return [
        gr.update(value=words.new),
        gr.update(label=words.conversations, info=words.nothing),
        gr.update(value=words.delete),
        gr.update(value=words.delete_surely),
        gr.update(value=words.keep),
        gr.update(label=words.chat),
        gr.update(label=words.generation),
        gr.update(examples=examples, placeholder=f"### {words.greeting}"),
        gr.update(placeholder=words.message),
        gr.update(label=words.system),
        gr.update(label=words.prompt, placeholder=words.prompt_hint),
        gr.update(value=words.go_on),
        gr.update(value=words.stop),
        gr.update(label=words.sampling),
        gr.update(label=words.sampling),
        *sliders,
        *sliders,
    ]


def _busy() -> Any:
    """In place of taking the next message, the box offers to end the reply."""
    return gr.update(submit_btn=False, stop_btn=True)


def _ready() -> Any:
    """The box takes the next message."""
    return gr.update(submit_btn=True, stop_btn=False)


def _visible(*values: bool) -> list[Any]:
    return [gr.update(visible=value) for value in values]


def _messages(system: str, history: Messages) -> list[Message]:
    whole = [{"role": "system", "content": system}] if system.strip() else []
    return [Message.model_validate(message) for message in [*whole, *history]]


def _open(saved: dict[str, Any], width: float, request: gr.Request) -> list[Any]:
    """What a visitor sees first: the browser's language, the conversation of last time. On a telephone the
    sidebar would cover it."""
    language = saved["language"] or preferred(request.headers.get("accept-language", ""))
    found = conversations.current(saved)
    messages = found["messages"] if found else []
    sidebar = gr.update(open=width > _NARROW)
    return [
        sidebar,
        language,
        *_captions(LANGUAGES[language]),
        conversations.listed(saved, language),
        messages,
    ]


def _speak(saved: dict[str, Any], language: str) -> dict[str, Any]:
    return {**saved, "language": language}
