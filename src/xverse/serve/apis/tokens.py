"""``/tokenize`` and ``/detokenize`` in vLLM's form."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import Field, StrictBool, StrictStr

from xverse.config import UserError
from xverse.serve import tools
from xverse.serve.apis.embeddings import MOST_TOKENS
from xverse.serve.errors import ApiError
from xverse.serve.fields import Body
from xverse.serve.protocol import MOST_TOOLS, Message, TokenIds, Tool
from xverse.serve.service import Service
from xverse.tokenizer.chat import PREFIXES
from xverse.tokenizer.template import template_ids

_MOST_SPECIAL = 100_000  # characters in which special tokens are looked for; others wait meanwhile


class TokenizeRequest(Body):
    """``POST /tokenize``: a text (``prompt`` or ``text``), or a conversation as in a chat request."""

    model: StrictStr = ""
    prompt: StrictStr | None = None
    text: StrictStr | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] = Field(default_factory=list)
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    allow_special: StrictBool = False
    return_token_strs: StrictBool = False


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: StrictStr = ""
    tokens: Annotated[TokenIds, Field(max_length=MOST_TOKENS)]


def mount(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        return JSONResponse(await asyncio.to_thread(tokenized, service, body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.of(body.model)
        try:
            text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, False)
        except UserError as error:
            raise ApiError(400, f"tokens: {error}") from None
        return JSONResponse({"text": text, "prompt": text})  # vLLM's name is prompt


def tokenized(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """The answer to ``/tokenize``: the ids that a completion of the text, or a chat, would begin with."""
    service.of(body.model)
    text = body.text if body.prompt is None else body.prompt
    if sum(given is not None for given in (body.prompt, body.text, body.messages)) != 1:
        raise ApiError(400, "prompt: send one of prompt, text and messages")
    if body.allow_special and len(text or "") > _MOST_SPECIAL:
        rule = f"is limited to prompts of {_MOST_SPECIAL} characters"
        raise ApiError(400, f"allow_special: {rule}")
    if body.messages is not None:
        ids = _conversation(service, body, body.messages)
    else:
        ids = service.tokenizer.encode(text or "", allow_special=body.allow_special)
        if body.add_special_tokens:
            ids = [*service.tokenizer.prefix_ids, *ids]
    if len(ids) > MOST_TOKENS:  # an answer that took seconds to write
        raise ApiError(400, f"prompt: {len(ids)} tokens are too many; the limit is {MOST_TOKENS}")
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.context, "tokens": ids}
    strings = None
    if body.return_token_strs:
        token_bytes = service.tokenizer.token_bytes
        strings = [token_bytes(token).decode("utf-8", errors="replace") for token in ids]
    return {**answer, "token_strs": strings}


def _conversation(service: Service, body: TokenizeRequest, messages: list[Message]) -> list[int]:
    tokenizer = service.tokenizer
    if body.add_generation_prompt or body.continue_final_message:
        return service.chat_ids(messages, body.tools, body.continue_final_message)
    if tokenizer.template is not None:
        written = tools.chat_messages(messages, body.tools)
        return template_ids(tokenizer, written, add_generation_prompt=False)
    begin = tokenizer.encode(PREFIXES["assistant"])  # of the reply
    return service.chat_ids(messages, body.tools, False)[: -len(begin)]
