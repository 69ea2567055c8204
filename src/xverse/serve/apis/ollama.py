"""Ollama's API: ``/api/chat``, ``/api/generate``, ``/api/embed`` and what describes the model."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import fastapi
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

import xverse
from xverse.engine import Request
from xverse.kernels.linear import weights_kind
from xverse.serve.access_log import current
from xverse.serve.apis.embeddings import MOST_INPUTS, check_dimensions, embedded
from xverse.serve.apis.ollama_bodies import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
    use_field_names,
)
from xverse.serve.apis.talk import Talk, talk
from xverse.serve.calls import CallParser, CallPiece, Content, read_arguments
from xverse.serve.errors import ApiError
from xverse.serve.exchange import NDJSON, respond, while_connected
from xverse.serve.replies import failed
from xverse.serve.service import LATEST, Service
from xverse.tokenizer.chat_template import CHAT_TEMPLATE

COMPATIBLE = "0.12.6"  # the version of Ollama whose API this is; clients compare it


def mount(app: FastAPI, service: Service) -> None:
    @app.post("/api/chat")
    async def chat(body: OllamaChatRequest, request: fastapi.Request) -> Response:
        chosen = _of(service, body.model)
        body.check()
        if not body.messages:
            return _loaded(body, chosen, {"message": {"role": "assistant", "content": ""}})
        reply = _Reply(body.model, await talk(chosen, request, body.chat(), use_field_names(), clamp=True))
        return await respond(service, request, reply, body.stream, kind=NDJSON)

    @app.post("/api/generate")
    async def generate(body: OllamaGenerateRequest, request: fastapi.Request) -> Response:
        chosen = _of(service, body.model)
        body.check()
        if not body.prompt:
            return _loaded(body, chosen, {"response": ""})
        field_names = use_field_names(messages="prompt")
        if body.raw:
            begun = await _raw(chosen, request, body)
        else:
            begun = await talk(chosen, request, body.chat(), field_names, clamp=True)
        reply = _Reply(body.model, begun, plain=True)
        return await respond(service, request, reply, body.stream, kind=NDJSON)

    @app.post("/api/embed")
    async def embed(body: OllamaEmbedRequest, request: fastapi.Request) -> Response:
        begin = time.monotonic()
        chosen = _of(service, body.model)
        check_dimensions(chosen, body.dimensions)
        vectors, tokens = await _embedded(chosen, request, body.input, body.truncate)
        answer = {"model": body.model, "embeddings": vectors, "prompt_eval_count": tokens}
        return JSONResponse({**answer, "total_duration": _since(begin), "load_duration": 0})

    @app.post("/api/embeddings")
    async def embeddings(body: OllamaEmbeddingsRequest, request: fastapi.Request) -> Response:
        chosen = _of(service, body.model)
        vectors, _ = await _embedded(chosen, request, [body.prompt] if body.prompt else [], True)
        return JSONResponse({"embedding": vectors[0] if vectors else []})

    @app.get("/api/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [_entry(each) for each in (service, *service.adapted.values())]}

    @app.get("/api/ps")
    async def loaded() -> dict[str, Any]:
        on_gpu = service.runner.engine.device.type != "cpu"
        models = []
        for each in (service, *service.adapted.values()):
            entry = _entry(each)
            del entry["modified_at"]
            entry |= {"expires_at": "9999-12-31T23:59:59Z", "size_vram": entry["size"] if on_gpu else 0}
            models.append({**entry, "context_length": service.context})
        return {"models": models}

    @app.post("/api/show")
    async def show(body: OllamaShowRequest) -> Response:
        return JSONResponse(_shown(_of(service, body.model or body.name)))

    @app.get("/api/version")
    async def version() -> dict[str, str]:
        return {"version": COMPATIBLE, "xverse": xverse.__version__}

    @app.post("/api/pull")
    @app.post("/api/push")
    @app.post("/api/create")
    @app.post("/api/copy")
    @app.delete("/api/delete")
    async def manage() -> None:
        raise ApiError(400, f"this server has the model '{service.name}' only and does not manage models")


def _of(service: Service, name: str) -> Service:
    """The service of this name. Raises ApiError in Ollama's words if there is none."""
    current().model = service.name
    if not name:
        raise ApiError(400, "model is required")
    for each in (service, *service.adapted.values()):
        if name.removesuffix(LATEST) == each.name.removesuffix(LATEST):
            current().model = each.name
            return each
    raise ApiError(404, f"model '{name[:80]}' not found", code="model_not_found")


async def _raw(service: Service, request: fastapi.Request, body: OllamaGenerateRequest) -> Talk:
    """The continuation of the prompt as it is."""
    ids = await asyncio.to_thread(service.prompt_ids, body.prompt)
    completion = body.completion(max(service.context - len(ids), 1))
    grammar = await while_connected(request, service.grammars.of(completion))
    (only,) = await asyncio.to_thread(service.complete, completion, grammar)
    return Talk(service, only, CallParser(()))


class _Reply:
    """The response to one request. ``plain``: of ``/api/generate``, which has a text instead of a message."""

    def __init__(self, model: str, talk: Talk, plain: bool = False) -> None:
        self._model, self._talk, self._plain = model, talk, plain
        self._begin, self._first = time.monotonic(), 0
        self._call: dict[str, str] | None = None  # the call that grows

    @property
    def requests(self) -> list[Request]:
        return [self._talk.choice.request]

    async def body(self) -> dict[str, Any]:
        """The last line of the stream, with the whole text and all calls."""
        content, calls = "", list[dict[str, Any]]()
        line: dict[str, Any] = {}
        async with aclosing(self._lines()) as lines:
            async for line in lines:
                content += line["response"] if self._plain else line["message"]["content"]
                calls += [] if self._plain else line["message"].get("tool_calls", [])
        return {**line, **self._message(content, calls)}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._lines()) as lines:
                async for line in lines:
                    yield _line(line)
        except Exception as error:
            yield _line(failed(error))

    async def _lines(self) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(self._talk.pieces()) as pieces:
            async for piece in pieces:
                self._first = self._first or _since(self._begin)
                for message in self._take(piece):
                    yield {"model": self._model, "created_at": _now(), **message, "done": False}
        for message in self._complete():
            yield {"model": self._model, "created_at": _now(), **message, "done": False}
        used, total = self._talk.usage(), _since(self._begin)
        first = self._first or total
        yield {
            "model": self._model,
            "created_at": _now(),
            **self._message("", []),
            "done": True,
            "done_reason": "length" if self._talk.ending == "length" else "stop",
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": used["prompt_tokens"],
            "prompt_eval_duration": first,
            "eval_count": used["completion_tokens"],
            "eval_duration": total - first,
        }

    def _take(self, piece: Content | CallPiece) -> Iterator[dict[str, Any]]:
        """Calls are sent whole."""
        if isinstance(piece, Content):
            yield self._message(piece.text, [])
        elif piece.name is None:
            assert self._call is not None
            self._call["arguments"] += piece.arguments
        else:
            yield from self._complete()
            self._call = {"name": piece.name, "arguments": piece.arguments}

    def _complete(self) -> Iterator[dict[str, Any]]:
        """The call that has grown, unless it was cut off."""
        call, self._call = self._call, None
        if call is not None and (arguments := read_arguments(call["arguments"])) is not None:
            yield self._message("", [{"function": {"name": call["name"], "arguments": arguments}}])

    def _message(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        if self._plain:
            return {"response": text}
        more = {"tool_calls": calls} if calls else {}
        return {"message": {"role": "assistant", "content": text, **more}}


def _loaded(body: Any, service: Service, empty: dict[str, Any]) -> Response:
    """The answer to a request without text, by which Ollama's clients load and unload a model."""
    reason = "unload" if body.keep_alive == 0 else "load"
    answer = {"model": body.model, "created_at": _now(), **empty, "done": True, "done_reason": reason}
    return Response(_line(answer), media_type=NDJSON if body.stream else "application/json")


async def _embedded(
    service: Service, request: fastapi.Request, texts: list[str], truncate: bool
) -> tuple[list[list[float]], int]:
    if len(texts) > MOST_INPUTS:
        raise ApiError(400, f"input: {len(texts)} texts are too many; the limit is {MOST_INPUTS}")
    prompts = await asyncio.to_thread(lambda: [service.prompt_ids(text) for text in texts])
    if truncate:
        prompts = [ids[: service.context] for ids in prompts]
    if not prompts:
        return [], 0
    choices = await while_connected(request, embedded(service, prompts))
    return [choice.embedding or [] for choice in choices], sum(map(len, prompts))


def _details(service: Service) -> dict[str, Any]:
    model = service.runner.engine.model
    kind = weights_kind(model)
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    count = model.config.num_parameters()
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    return {
        "parent_model": service.parent or "",
        "format": "safetensors",
        "family": "xverse",
        "families": ["xverse"],
        "parameter_size": size,
        "quantization_level": kinds.get(kind, kind.upper()),
    }


def _entry(service: Service) -> dict[str, Any]:
    name = service.name if ":" in service.name else service.name + LATEST
    model = service.runner.engine.model
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "name": name,
        "model": name,
        "modified_at": _time(service.created),
        "size": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "digest": hashlib.sha256(service.fingerprint.encode()).hexdigest(),
        "details": _details(service),
    }


def _shown(service: Service) -> dict[str, Any]:
    config, sampling = service.runner.engine.model.config, service.sampling
    parameters = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "num_predict": sampling.max_new_tokens,
    }
    return {
        "modelfile": f"FROM {service.name}\n",
        "parameters": "\n".join(f"{name:30} {value}" for name, value in parameters.items()),
        "template": service.tokenizer.template or CHAT_TEMPLATE,
        "details": _details(service),
        "model_info": {
            "general.architecture": "xverse",
            "general.basename": service.name,
            "general.parameter_count": config.num_parameters(),
            "xverse.attention.head_count": config.num_attention_heads,
            "xverse.block_count": config.num_hidden_layers,
            "xverse.context_length": service.context,
            "xverse.embedding_length": config.hidden_size,
            "xverse.feed_forward_length": config.intermediate_size,
            "xverse.vocab_size": config.vocab_size,
        },
        "capabilities": ["completion", "tools", "embedding"],
        "modified_at": _time(service.created),
    }


def _since(begin: float) -> int:
    """Nanoseconds."""
    return int((time.monotonic() - begin) * 1e9)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


def _time(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
