"""``/v1/score`` in vLLM's form, ``/rerank`` in Jina's and Cohere's: how well documents answer a query.

The score is the query's likelihood given the document, the geometric mean of its tokens' probabilities: the
model reads the document and is asked for a question about it (Sachan et al., 2022, arXiv:2204.07496).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Annotated, Any

import fastapi
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import Field, PlainValidator, StrictBool, StrictStr

from xverse.engine import Request
from xverse.serve.apis.embeddings import MOST_INPUTS, MOST_TOKENS, prompted
from xverse.serve.errors import ApiError
from xverse.serve.exchange import while_connected
from xverse.serve.fields import Body, rule
from xverse.serve.protocol import Message, Whole
from xverse.serve.replies import new_id, usage
from xverse.serve.service import Service

_ASK = "Passage: {document}. Please write a question based on this passage."


def _texts(value: Any) -> list[str]:
    """Texts, or objects with a text, as Cohere and Jina have them."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise rule("must be a text or a list of texts")
    if len(value) > MOST_INPUTS:
        raise rule(f"{len(value)} texts are too many; the limit is {MOST_INPUTS}")
    found = []
    for index, one in enumerate(value):
        text = one.get("text") if isinstance(one, dict) else one
        if not isinstance(text, str):
            raise rule("must be text, or an object with a text", f"[{index}]")
        if not text:
            raise rule("must not be empty", f"[{index}]")
        found.append(text)
    return found


Texts = Annotated[
    list[str], PlainValidator(_texts, json_schema_input_type=StrictStr | list[StrictStr | dict[str, Any]])
]


class ScoreRequest(Body):
    """``POST /v1/score``: one query and several documents, or as many of one as of the other."""

    model: StrictStr = ""
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None  # vLLM's newer names
    documents: Texts | None = None


class RerankRequest(Body):
    """``POST /rerank``, ``/v1/rerank`` and ``/v2/rerank``."""

    model: StrictStr = ""
    query: Annotated[StrictStr, Field(min_length=1)]
    documents: Texts
    top_n: Annotated[Whole, Field(ge=1)] | None = None
    return_documents: StrictBool | None = None
    max_tokens_per_doc: Annotated[Whole, Field(ge=1)] | None = None


def mount(app: FastAPI, service: Service) -> None:
    @app.post("/score")
    @app.post("/v1/score")
    async def score(body: ScoreRequest, request: fastapi.Request) -> Response:
        chosen = service.of(body.model)
        queries = _given(body, "text_1", "queries")
        documents = _given(body, "text_2", "documents")
        if len(queries) == 1:
            queries *= len(documents)
        if len(queries) != len(documents):
            counts = f"{len(queries)} texts do not pair with {len(documents)} of text_2"
            raise ApiError(400, f"text_1: {counts}; send one, or as many")
        work = _likelihoods(chosen, queries, documents, "text_2")
        scores, used = await while_connected(request, work)
        answer = {
            "id": new_id("score"),
            "object": "list",
            "created": int(time.time()),
            "model": chosen.name,
            "data": [{"index": at, "object": "score", "score": value} for at, value in enumerate(scores)],
            "usage": {**used, "completion_tokens": 0},
        }
        return JSONResponse(answer)

    @app.post("/rerank")
    @app.post("/v1/rerank")
    @app.post("/v2/rerank")
    async def rerank(body: RerankRequest, request: fastapi.Request) -> Response:
        chosen = service.of(body.model)
        queries = [body.query] * len(body.documents)
        work = _likelihoods(chosen, queries, body.documents, "documents", body.max_tokens_per_doc)
        scores, counts = await while_connected(request, work)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        with_text = body.return_documents
        if with_text is None:  # Cohere's second version leaves them out
            with_text = not request.url.path.endswith("/v2/rerank")
        results = [
            {
                "index": index,
                "relevance_score": scores[index],
                **({"document": {"text": body.documents[index]}} if with_text else {}),
            }
            for index in order
        ]
        answer = {"id": new_id("rerank"), "model": chosen.name, "usage": counts, "results": results}
        return JSONResponse(answer)


def _given(body: ScoreRequest, name: str, other: str) -> list[str]:
    found = [value for value in (getattr(body, name), getattr(body, other)) if value is not None]
    if len(found) != 1:
        text = f"{name}: required field is missing" if not found else f"{name} and {other} are the same field"
        raise ApiError(400, text, param=name, code=None if found else "missing_field")
    return list(found[0])


async def _likelihoods(
    service: Service, queries: Sequence[str], documents: Sequence[str], field: str, most: int | None = None
) -> tuple[list[float], dict[str, int]]:
    """The score of each pair, 0 to 1, and token counts. ``most``: tokens of a document that are read."""
    requests = await asyncio.to_thread(_requests, service, queries, documents, field, most)
    choices = await prompted(service, requests, field)
    scores = []
    for choice in choices:
        logprobs = [token.logprob for token in choice.prompt_logprobs]
        scores.append(math.exp(sum(logprobs) / len(logprobs)))
    counts = usage(choices, len(choices))
    return scores, {name: counts[name] for name in ("prompt_tokens", "total_tokens")}


def _requests(
    service: Service, queries: Sequence[str], documents: Sequence[str], field: str, most: int | None
) -> list[Request]:
    requests, total = [], 0
    tokenizer = service.tokenizer
    for query, document in zip(queries, documents, strict=True):
        if most is not None:
            document = tokenizer.decode(tokenizer.encode(document)[:most])
        question = Message(role="user", content=_ASK.format(document=document))
        prompt = service.chat_ids([question], [], False)
        ids = [*prompt, *tokenizer.encode(query)]
        total += len(ids)
        if total > MOST_TOKENS:  # here, because a long query is encoded with each of the documents
            text = f"{field}: more than {MOST_TOKENS} tokens, together with the queries, are too many"
            raise ApiError(400, text)
        requests.append(
            Request(
                prompt_ids=ids,
                prompt_logprobs=0,
                prompt_start=len(prompt),
                adapter=service.adapter,
                generate=False,
            )
        )
    return requests
