"""The web page at ``/``: conversations, and plain continuation of a text.

Gradio draws it. Generation passes through the same service as requests to the API, with the same limits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

import gradio as gr
from fastapi import FastAPI
from pydantic import ValidationError

from xverse.config import UserError
from xverse.engine import Request, SamplingParams
from xverse.engine.sampling_params import COMPLETION, PARAMS
from xverse.serve import page_conversations as conversations
from xverse.serve.errors import ApiError
from xverse.serve.page_conversations import Messages
from xverse.serve.page_texts import LANGUAGES, Texts, preferred
from xverse.serve.page_turns import (
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
from xverse.serve.protocol import ChatRequest, CompletionRequest, Message
from xverse.serve.replies import Choice, events
from xverse.serve.runner import Busy, Draining
from xverse.serve.service import Service

T = TypeVar("T", ChatRequest, CompletionRequest)
_NARROW = 800  # pixels
_LEAST_ROOM = 256  # tokens for a reply, below which old messages are left out
_IDLE_PAUSE = 0.08  # seconds
_PAUSE = 0.05  # seconds between two updates of a reply; more often would not be visible
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
        max_file_size="1b",  # no uploads
    )


def _blocks(service: Service, first: str) -> gr.Blocks:
    # By default Gradio keeps 10,000 events and rebuilds a table of them after every one.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
    blocks = gr.Blocks(title=service.name, analytics_enabled=False, fill_height=True)
    blocks.queue(default_concurrency_limit=None, max_size=service.runner.most, api_open=False)
    # By default Gradio polls a thousand times a second, which costs an idle server 5 % of a core.
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = _IDLE_PAUSE
    with blocks:
        page = _Page(service, first)
        page.connect(blocks)
    return blocks


class _Page:
    """The components and their event handlers."""

    def __init__(self, service: Service, first: str) -> None:
        self._service = service
        self._answers = Replies()
        self._continuations = Replies()
        texts = LANGUAGES["en"]
        # Not a real secret: with a random one browsers would lose their data when the server restarts.
        self.saved = gr.BrowserState(conversations.nothing_saved(), storage_key="xverse", secret="xverse")
        self.width = gr.Number(visible=False)  # of the window
        self.chosen = gr.Textbox(visible=False)  # the conversation to show once the reply has ended
        with gr.Sidebar(width=290, open=False) as self.sidebar:
            self.language = gr.Radio(
                [("中文", "zh"), ("English", "en")], value="en", container=False, elem_id="language"
            )
            self.new = gr.Button(texts.new, variant="primary", elem_id="new")
            self.conversations = gr.Radio(
                [], label=texts.conversations, info=texts.nothing, elem_id="conversations"
            )
            self.delete = gr.Button(texts.delete, size="sm", elem_id="delete")
            with gr.Row():
                self.delete_surely = gr.Button(
                    texts.delete_surely, size="sm", variant="stop", visible=False, elem_id="delete-surely"
                )
                self.keep = gr.Button(texts.keep, size="sm", visible=False)
        with gr.Tabs(selected=first):
            with gr.Tab(texts.chat, id="chat") as self.chat_tab:
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
                with gr.Accordion(texts.sampling, open=False) as self.chat_settings:
                    self.system = gr.Textbox("", label=texts.system, lines=2, elem_id="system")
                    self.chat_controls = _controls(service.sampling, service.context)
            with gr.Tab(texts.generation, id="generation") as self.text_tab:
                self.text = gr.Textbox("", lines=14, max_lines=30, label=texts.prompt, elem_id="text")
                self.text_status = gr.Markdown("", elem_id="text-status")
                with gr.Row():
                    self.go_on = gr.Button(texts.go_on, variant="primary", elem_id="go-on")
                    self.stop = gr.Button(texts.stop, elem_id="stop")
                with gr.Accordion(texts.sampling, open=False) as self.text_settings:
                    self.text_controls = _controls(COMPLETION, service.context)

    def connect(self, blocks: gr.Blocks) -> None:
        """Bind the event handlers."""
        spoken = {self.chat, self.system, self.language, *self.chat_controls.values()}
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
            # These need their event's data, which only the first step receives. What they read from the page
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
        # When the reply has ended, the list would mark its conversation as the chosen one again.
        turn = self.conversations.input(
            None, self.conversations, self.chosen, js=ENDING_REPLY, queue=False, **QUIET
        )
        end_turn(follow(turn, (conversations.choose, [*at, self.chosen], left)))
        confirmation = [self.delete, self.delete_surely, self.keep]
        self.delete.click(lambda: _visible(False, True, True), None, confirmation, queue=False, **QUIET)
        for button in (self.keep, self.delete_surely):
            button.click(lambda: _visible(True, False, False), None, confirmation, queue=False, **QUIET)

        written = {self.text, self.language, *self.text_controls.values()}
        self.go_on.click(self._continue, written, [self.text, self.text_status], **QUIET)
        self.stop.click(self._continuations.end, None, None, queue=False, **QUIET)

        translated = list(self._captions("en"))
        captioned = self.language.input(self._captions, self.language, translated, queue=False, **QUIET)
        turn = captioned.success(None, None, None, js=AFTER_REPLY, queue=False, **QUIET)
        end_turn(follow(turn, (_speak, [self.saved, self.language], self.saved)))
        turn = blocks.load(None, None, self.width, js=WIDTH, queue=False, **QUIET)
        opened = [self.sidebar, self.language, *translated, self.conversations, self.chat]
        end_turn(follow(turn, (self._open, [self.saved, self.width], opened)))

    def _captions(self, language: str) -> dict[Any, Any]:
        """Each component that has a text, and an update with its text in ``language``."""
        texts = LANGUAGES[language]
        examples = [{"text": prompt, "display_text": skill} for skill, prompt in texts.examples]
        captions: dict[Any, Any] = {
            self.new: gr.update(value=texts.new),
            self.conversations: gr.update(label=texts.conversations, info=texts.nothing),
            self.delete: gr.update(value=texts.delete),
            self.delete_surely: gr.update(value=texts.delete_surely),
            self.keep: gr.update(value=texts.keep),
            self.chat_tab: gr.update(label=texts.chat),
            self.text_tab: gr.update(label=texts.generation),
            self.chat: gr.update(examples=examples, placeholder=f"### {texts.greeting}"),
            self.message: gr.update(placeholder=texts.message),
            self.system: gr.update(label=texts.system),
            self.text: gr.update(label=texts.prompt, placeholder=texts.prompt_hint),
            self.go_on: gr.update(value=texts.go_on),
            self.stop: gr.update(value=texts.stop),
            self.chat_settings: gr.update(label=texts.sampling),
            self.text_settings: gr.update(label=texts.sampling),
        }
        for controls in (self.chat_controls, self.text_controls):
            for name, control in controls.items():
                label, info = PARAMS[name].text(language)
                captions[control] = gr.update(label=label, info=info)
        return captions

    def _open(self, saved: dict[str, Any], width: float, request: gr.Request) -> dict[Any, Any]:
        """The first view: in the browser's language, with the last conversation. On a phone the sidebar would
        cover it."""
        language = saved["language"] or preferred(request.headers.get("accept-language", ""))
        chat = conversations.current(saved)
        view = self._captions(language)
        view[self.sidebar] = gr.update(open=width > _NARROW)
        view[self.language] = language
        view[self.conversations] |= conversations.listed(saved, language)
        view[self.chat] |= {"value": chat["messages"] if chat else []}
        return view

    async def _answer(
        self, inputs: dict[Any, Any], window: gr.Request
    ) -> AsyncGenerator[tuple[Messages, str], None]:
        """The conversation with the reply to its last message, as it grows, until it is ended."""
        texts = LANGUAGES[inputs[self.language]]
        history = conversations.plain(inputs[self.chat])
        if not history or history[-1]["role"] != "user":  # an empty message was sent
            return
        fields = _sampling(self.chat_controls, inputs)
        body = _body(ChatRequest, messages=_messages(inputs[self.system], history), **fields)
        with self._answers.begin(window) as ending:
            try:
                request, dropped = await asyncio.to_thread(self._fitting, body)
            except (ApiError, UserError) as error:
                raise gr.Error(str(error)) from None
            if dropped:
                gr.Info(texts.forgotten)
            async with aclosing(self._stream(request, texts, ending)) as pieces:
                async for text, status in pieces:
                    yield [*history, {"role": "assistant", "content": text}], status

    def _fitting(self, body: ChatRequest) -> tuple[Request, int]:
        """An engine request, and how many of the oldest messages were left out for it. Raises ApiError if
        the last message alone is too long."""
        dropped = 0
        limit = body.sampling()["max_new_tokens"]
        body = body.model_copy(update={PARAMS["max_new_tokens"].http: min(limit, _LEAST_ROOM)})
        while True:
            try:
                (request,) = self._service.chat(body)
                left = self._service.context - len(request.prompt_ids)
                sampling = dataclasses.replace(request.sampling, max_new_tokens=min(limit, left))
                return dataclasses.replace(request, sampling=sampling), dropped
            except ApiError as error:
                begin = int(body.messages[0].role == "system")
                if error.code != "context_length_exceeded" or len(body.messages) - begin < 3:
                    raise
                del body.messages[begin : begin + 2]
                dropped += 2

    async def _continue(
        self, inputs: dict[Any, Any], window: gr.Request
    ) -> AsyncGenerator[tuple[str, str], None]:
        """The text with its continuation, as it grows, until it is ended."""
        texts, text = LANGUAGES[inputs[self.language]], inputs[self.text]
        if not text:
            raise gr.Error(texts.empty)
        body = _body(CompletionRequest, prompt=text, **_sampling(self.text_controls, inputs))
        with self._continuations.begin(window) as ending:
            try:
                (request,) = await asyncio.to_thread(self._service.complete, body)
            except (ApiError, UserError) as error:
                raise gr.Error(str(error)) from None
            async with aclosing(self._stream(request, texts, ending)) as pieces:
                async for more, status in pieces:
                    yield text + more, status

    async def _stream(
        self, request: Request, texts: Texts, ending: asyncio.Event
    ) -> AsyncGenerator[tuple[str, str], None]:
        """The text so far and the speed, twenty times a second and at the end, which ``ending`` may bring."""
        choice = Choice(0, request)
        begin = last = time.monotonic()

        def speed() -> str:
            rate = choice.tokens / max(time.monotonic() - begin, 1e-6)
            return texts.speed.format(tokens=choice.tokens, rate=rate)

        try:
            async with (
                aclosing(events(self._service, choice)) as produced,
                aclosing(until_ending(ending, produced)) as pieces,
            ):
                async for event in pieces:
                    now = time.monotonic()
                    if event.finish_reason is None and now - last < _PAUSE:
                        continue
                    last = now
                    yield choice.text, speed()
            if ending.is_set() and choice.text:
                yield choice.text, speed()
        except (ApiError, UserError, Busy, Draining) as error:
            raise gr.Error(str(error)) from None


def _controls(defaults: SamplingParams, context: int) -> dict[str, Any]:
    """A control for each sampling parameter, by its name."""
    controls: dict[str, Any] = {}
    with gr.Row():
        for name, param in PARAMS.items():
            label, info = param.text("en")
            texts: dict[str, Any] = {"label": label, "info": info, "min_width": 240}
            value = getattr(defaults, name)
            if param.slider is not None:
                low, high, step = param.slider
                high = max(context - 1, 1) if math.isinf(high) else high
                controls[name] = gr.Slider(low, high, min(value, high), step=step, **texts)
            elif param.kind is int:
                controls[name] = gr.Number(value, precision=0, **texts)
            elif param.kind is str:
                controls[name] = gr.Textbox("\n".join(value), lines=1, max_lines=4, **texts)
    return controls


def _sampling(controls: dict[str, Any], inputs: dict[Any, Any]) -> dict[str, Any]:
    """The values of the controls as fields of a request."""
    values: dict[str, Any] = {}
    for name, control in controls.items():
        param, value = PARAMS[name], inputs[control]
        if value is not None:
            lines = [line for line in str(value).splitlines() if line]
            values[param.http] = lines if param.kind is str else param.kind(value)
    return values


def _body(kind: type[T], **fields: Any) -> T:
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise gr.Error(f"{first['loc'][0]}: {first['msg']}") from None


def _busy() -> Any:
    """Instead of sending the next message, the box offers to end the reply."""
    return gr.update(submit_btn=False, stop_btn=True)


def _ready() -> Any:
    """The box accepts the next message."""
    return gr.update(submit_btn=True, stop_btn=False)


def _visible(*values: bool) -> list[Any]:
    return [gr.update(visible=value) for value in values]


def _messages(system: str, history: Messages) -> list[Message]:
    whole = [{"role": "system", "content": system}] if system.strip() else []
    return [Message.model_validate(message) for message in [*whole, *history]]


def _speak(saved: dict[str, Any], language: str) -> dict[str, Any]:
    return {**saved, "language": language}
