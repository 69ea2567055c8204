"""``/v1/embeddings``, ``/v1/score``, ``/rerank`` and ``/tokenize``."""

from __future__ import annotations

import base64
import math
import struct
import time
from typing import Any

import openai
import pytest
import torch

from xverse.model.attention import FullCausal

QUESTION: list[Any] = [{"role": "user", "content": "What is your name?"}]


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return server.openai()


@torch.inference_mode()
def hidden_states(server: Any, ids: list[int]) -> torch.Tensor:
    """By the model's plain forward pass, float32 [T, D]."""
    model = server.service.runner.engine.model
    tokens = torch.tensor([ids])
    return model.model(tokens, FullCausal(1, len(ids)))[0].float()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states(server: Any, client: Any, pooling: str) -> None:
    texts = ["The capital of France is Paris.", "水", "word " * 700]  # the last one takes two chunks
    reply = client.embeddings.create(model="nano", input=texts, extra_body={"pooling": pooling})
    assert [each.index for each in reply.data] == [0, 1, 2]
    ids = [server.service.tokenizer.encode(text) for text in texts]
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, ids))
    for each, tokens in zip(reply.data, ids, strict=True):
        states = hidden_states(server, tokens)
        expected = states.mean(dim=0) if pooling == "mean" else states[-1]
        found = torch.tensor(each.embedding)
        assert torch.allclose(found, expected / expected.norm(), atol=5e-3)
        assert float(found.norm()) == pytest.approx(1, abs=1e-5)
    by_ids = client.embeddings.create(model="nano", input=ids[:2], extra_body={"pooling": pooling})
    assert by_ids.data[0].embedding == pytest.approx(reply.data[0].embedding, abs=5e-3)


def test_encodings(server: Any) -> None:
    with server.client() as http:
        plain = http.post("/v1/embeddings", json={"input": "one"}).json()["data"][0]["embedding"]
        packed = http.post("/v1/embeddings", json={"input": "one", "encoding_format": "base64"}).json()
    values = struct.unpack(f"<{len(plain)}f", base64.b64decode(packed["data"][0]["embedding"]))
    assert list(values) == pytest.approx(plain)
    assert len(plain) == server.service.runner.engine.model.config.hidden_size


def test_the_engine_embeds(server: Any, nano: Any, client: Any) -> None:
    ids = server.service.tokenizer.encode("one")
    (found,) = nano.engine.embed([ids])
    assert found == pytest.approx(
        client.embeddings.create(model="nano", input="one").data[0].embedding, abs=5e-3
    )


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        ({}, 400, "input", "missing"),
        ({"input": ""}, 400, "input", "must not be empty"),
        ({"input": []}, 400, "input", "empty"),
        ({"input": ["a", 5]}, 400, "input[1]", "must be text or a list of token ids"),
        ({"input": [10**9]}, 400, "input", "ids must be 0 to"),
        ({"input": ["x"] * 2049}, 400, "input", "the limit is 2048"),
        ({"input": ["a", [1] * 20_001]}, 400, "input[1]", "exceed the context"),
        ({"input": [[1] * 7000] * 43}, 400, "input", "the limit is 300000"),
        ({"input": "x", "dimensions": 100}, 400, "dimensions", "cannot be shortened"),
        ({"input": "x", "encoding_format": "hex"}, 400, "encoding_format", "must be 'float' or 'base64'"),
        ({"input": "x", "pooling": "max"}, 400, "pooling", "must be 'mean' or 'last'"),
        ({"input": "x", "model": "other"}, 404, "model", "does not exist"),
    ],
)  # fmt: skip
def test_embedding_errors(server: Any, body: Any, status: int, param: str, text: str) -> None:
    with server.client() as http:
        answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert text in error["message"]


def likelihood(server: Any, query: str, document: str) -> float:
    """By the model's plain forward pass."""
    tokenizer = server.service.tokenizer
    asked = f"Passage: {document}. Please write a question based on this passage."
    prompt = tokenizer.encode("Human: ") + tokenizer.encode(asked + "\n\n") + tokenizer.encode("Assistant: ")
    ids = tokenizer.encode(query)
    states = hidden_states(server, [*prompt, *ids])
    with torch.inference_mode():
        logprobs = server.service.runner.engine.model.lm_head(states).float().log_softmax(dim=-1)
    chosen = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
    return math.exp(chosen.mean().item())


def test_scores_are_likelihoods(server: Any) -> None:
    documents = ["Paris is the capital of France.", "My cat sleeps."]
    query = "What is the capital of France?"
    with server.client() as http:
        one = http.post("/v1/score", json={"model": "nano", "text_1": query, "text_2": documents[0]}).json()
        many = http.post("/score", json={"queries": query, "documents": documents}).json()
        paired = http.post("/v1/score", json={"text_1": [query, "x"], "text_2": documents}).json()
        ranked = http.post("/v1/rerank", json={"query": query, "documents": documents}).json()
    scores = [each["score"] for each in many["data"]]
    for score, document in zip(scores, documents, strict=True):
        assert score == pytest.approx(likelihood(server, query, document), rel=2e-2)
    assert one["data"] == [{"index": 0, "object": "score", "score": pytest.approx(scores[0], rel=1e-2)}]
    assert paired["data"][0]["score"] == pytest.approx(scores[0], rel=1e-2)
    assert one["usage"]["prompt_tokens"] > 20
    results = ranked["results"]
    assert [each["relevance_score"] for each in results] == pytest.approx(sorted(scores)[::-1], rel=1e-2)
    assert results[0]["document"]["text"] == documents[results[0]["index"]]


def test_rerank_shapes(server: Any) -> None:
    body = {"query": "x", "documents": ["a", {"text": "b"}, "c " * 500], "top_n": 2, "max_tokens_per_doc": 50}
    with server.client() as http:
        jina = http.post("/rerank", json=body).json()
        cohere = http.post("/v2/rerank", json={**body, "return_documents": None}).json()
    assert [len(each["results"]) for each in (jina, cohere)] == [2, 2]
    assert all("document" in each for each in jina["results"])
    assert all(set(each) == {"index", "relevance_score"} for each in cohere["results"])
    assert jina["usage"]["total_tokens"] < 300


@pytest.mark.parametrize(
    ("path", "body", "param", "text"),
    [
        ("/v1/score", {"text_1": "x"}, "text_2", "missing"),
        ("/v1/score", {"text_1": "x", "queries": "x", "text_2": "y"}, "text_1", "the same field"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "do not pair"),
        ("/v1/score", {"text_1": "x", "text_2": [5]}, "text_2[0]", "must be text"),
        ("/rerank", {"query": "x"}, "documents", "missing"),
        ("/rerank", {"query": "x", "documents": []}, "documents", "list of texts"),
        ("/rerank", {"query": "x", "documents": ["a"], "top_n": 0}, "top_n", "at least 1"),
        ("/rerank", {"query": "x", "documents": ["a ", "word " * 20_000]}, "documents[1]", "exceed"),
        ("/rerank", {"query": "", "documents": ["a"]}, "query", "must not be empty"),
        ("/rerank", {"query": "a " * 90_000, "documents": ["a"] * 2000}, "documents", "more than 300000"),
        ("/v1/score", {"text_1": "a " * 90_000, "text_2": ["a"] * 2000}, "text_2", "more than 300000"),
        ("/tokenize", {"prompt": "a b " * 200_000}, "prompt", "the limit is 300000"),
        ("/tokenize", {"prompt": "a b " * 30_000, "allow_special": True}, "allow_special", "limited"),
        ("/detokenize", {"tokens": [5] * 300_001}, "tokens", "the limit is 300000"),
        ("/detokenize", {"tokens": [5, 10**9]}, "tokens", "outside the vocabulary"),
    ],
)  # fmt: skip
def test_score_errors(server: Any, path: str, body: Any, param: str, text: str) -> None:
    begin = time.process_time()
    with server.client() as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert time.process_time() - begin < 5  # the query of 2,000 documents is not tokenised 2,000 times
    error = answer.json()["error"]
    assert error["param"] == param
    assert text in error["message"]


def test_tokenize_is_what_a_request_sends(server: Any, client: Any) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    with server.client() as http:
        asked = {"messages": QUESTION, "tools": [tool], "return_token_strs": True}
        found = http.post("/tokenize", json=asked).json()
        reply = client.chat.completions.create(
            model="nano", messages=QUESTION, tools=[tool], tool_choice="auto", max_tokens=1
        )
        assert found["count"] == len(found["tokens"]) == reply.usage.prompt_tokens
        assert found["max_model_len"] == server.service.context
        text = http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"]
        assert text.endswith("Assistant: ")
        assert "".join(found["token_strs"]) == text
        for body in ({}, {"prompt": "a", "text": "b"}, {"text": "a", "messages": QUESTION}):
            refused = http.post("/tokenize", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
        closed = http.post("/tokenize", json={"messages": QUESTION, "add_generation_prompt": False}).json()
        text = http.post("/detokenize", json={"tokens": closed["tokens"]}).json()["prompt"]
        assert text == "Human: What is your name?\n\n"
        assert http.post("/tokenize", json={"prompt": "x"}).json()["token_strs"] is None
        assert http.post("/detokenize", json={"model": "other", "tokens": [5]}).status_code == 404


def test_no_empty_stream_for_a_wrong_model(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="x")
