"""Several adapters in one batch: each replies as on a server of its own, bit by bit; and their API."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.config import UserError
from xverse.engine.load import load_engine
from xverse.formats import load_model, save_hf
from xverse.model.transformer import XverseForCausalLM, init_weights
from xverse.serve.app import InProcess
from xverse.serve.start import ServiceSettings, load_service

peft = pytest.importorskip("peft")
pytest.importorskip("llguidance")

TARGETS = {
    "one": (4, ["q_proj", "up_proj", "down_proj"], {}),
    "two": (8, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "lm_head"], {"use_rslora": True}),
    "three": (3, "all-linear", {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"1.mlp.up_proj": 40}}),
}


@pytest.fixture(scope="module")
def folder(wide_config: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and adapters that change its replies."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("other", 1)):
        model = XverseForCausalLM(wide_config)
        init_weights(model, seed=seed)
        save_hf(model, tiny_tokenizer, folder / name, torch.float32)
    for seed, (name, (rank, targets, options)) in enumerate(TARGETS.items()):
        made(folder / "base", folder / "adapters" / name, seed, r=rank, target_modules=targets, **options)
    return folder


def made(base: Path, out: Path, seed: int, **options: Any) -> Path:
    """An adapter of ``base`` with random weights."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(load_model(base), peft.LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    adapted.save_pretrained(out)
    return out


def service(folder: Path, names: Any = TARGETS, **settings: Any) -> Any:
    adapters = [f"{name}={folder / 'adapters' / name}" for name in names]
    defaults = {"speculate": True, "max_cache_tokens": 4096, "adapter_folder": str(folder / "adapters")}
    base = str(folder / "base")
    return load_service(ServiceSettings(model=base, adapter=adapters, **{**defaults, **settings}))


SHARED = "The same beginning of several requests, long enough for blocks of the prefix cache. " * 3
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 22, 333]}, "b": {"type": "boolean"}}}
SCHEMA |= {"required": ["a", "b"], "additionalProperties": False}


def bodies(model: str) -> list[tuple[str, dict[str, Any]]]:
    """Requests to every API that computes."""
    said = [{"role": "user", "content": "one two one two one two one two"}]
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    drawn = {"temperature": 1.0, "seed": 5}
    return [
        ("/v1/completions", {"prompt": SHARED, "max_tokens": 20, "logprobs": 3, "temperature": 0}),
        ("/v1/completions", {"prompt": SHARED + "x", "max_tokens": 9, "logprobs": 2, "echo": True, **drawn}),
        ("/v1/chat/completions", {"messages": said, "max_tokens": 12, "logprobs": True, "n": 2, **drawn}),
        ("/v1/chat/completions", {"messages": said, "max_tokens": 60, "response_format": form, **drawn}),
        ("/v1/responses", {"input": SHARED, "max_output_tokens": 16, "temperature": 0}),
        ("/v1/messages", {"messages": said, "max_tokens": 10, "temperature": 0}),
        ("/api/chat", {"messages": said, "stream": False, "options": {"num_predict": 8, "temperature": 0}}),
        ("/api/generate", {"prompt": "a b", "stream": False, "options": {"num_predict": 8, "seed": 3}}),
        ("/v1/embeddings", {"input": [SHARED, "short"]}),
        ("/v1/score", {"text_1": "what?", "text_2": [SHARED, "that"]}),
        ("/rerank", {"query": "what?", "documents": [SHARED, "that"]}),
        ("/api/embed", {"input": SHARED}),
    ]  # fmt: skip


def compared(body: Any) -> Any:
    """A reply without what differs each time."""
    if isinstance(body, dict):
        if "cache_read_input_tokens" in body:  # Anthropic's input_tokens are without these
            body = {**body, "input_tokens": body["input_tokens"] + body["cache_read_input_tokens"]}
            del body["cache_read_input_tokens"]
        varying = ("id", "created", "created_at", "completed_at", "system_fingerprint", "cached_tokens")
        ignored = (*varying, "input_tokens_details", "prompt_tokens_details")
        return {
            key: compared(value)
            for key, value in body.items()
            if key not in ignored and not key.endswith("_duration")
        }
    return [compared(value) for value in body] if isinstance(body, list) else body


def answers(served: Any, calls: list[tuple[str, dict[str, Any]]], together: bool) -> list[Any]:
    async def run() -> list[Any]:
        app = InProcess(served)
        async with app.running():
            if together:
                return await asyncio.gather(*(app.call(*call) for call in calls))
            return [await app.call(*call) for call in calls]

    return [(status, compared(body)) for status, _, body in asyncio.run(run())]


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_replies_are_those_of_a_server_with_the_adapter_alone(folder: Path, quantize: str | None) -> None:
    models = ["base", *TARGETS]
    alone = {}
    for model in models:
        served = service(folder, [] if model == "base" else [model], quantize=quantize)
        alone[model] = answers(
            served, [(url, {"model": model, **body}) for url, body in bodies(model)], False
        )
        assert all(status == 200 for status, _ in alone[model]), alone[model]
    calls = [
        (model, index, (url, {"model": model, **body}))
        for index in range(len(bodies("")))
        for model in models
        for url, body in [bodies(model)[index]]
    ]
    served = service(folder, quantize=quantize, max_batch=7, max_cache_tokens=2048)
    assert served.runner.engine.batch_invariant
    together = answers(served, [call for *_, call in calls], True)
    for (model, index, _), answer in zip(calls, together, strict=True):
        assert answer == alone[model][index], (model, index)
    stats = served.runner.engine.stats()
    assert stats.reused_tokens
    for index, (url, _) in enumerate(bodies("")):  # they do differ
        texts = {json.dumps(alone[model][index][1]).replace(model, "") for model in models}
        assert len(texts) > (1 if "response_format" in bodies("")[index][1] else len(models) - 1), url


def test_an_adapter_computes_what_peft_does(folder: Path) -> None:
    from xverse.engine import Request
    from xverse.model import FullCausal

    ids = [5, *range(300, 340)]
    for name in TARGETS:
        path = folder / "adapters" / name
        loaded = load_engine(str(folder / "base"), adapter=[f"{name}={path}"])
        request = Request(prompt_ids=ids, prompt_logprobs=0, generate=False, adapter=loaded.adapters[name])
        (event,) = loaded.engine.stream(request)
        config = peft.PeftConfig.from_pretrained(str(path))
        adapted = peft.PeftModel.from_pretrained(load_model(folder / "base"), str(path), config=config)
        with torch.no_grad():
            logits = adapted.get_base_model()(torch.tensor([ids]), FullCausal(1, len(ids)))[0]
        expected = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        found = torch.tensor([each.logprob for each in event.prompt_logprobs])
        assert (found - expected).abs().max() < 1e-4


def test_they_are_loaded_chosen_listed_and_unloaded(folder: Path) -> None:
    from starlette.testclient import TestClient

    from xverse.serve.access_log import AccessLog
    from xverse.serve.app import create_app

    served = service(folder, ["one"])
    app = AccessLog(create_app(served, None), served.metrics, log=False)  # notes which API is called
    with TestClient(app, base_url="http://127.0.0.1") as client:

        def call(path: str, **body: Any) -> tuple[int, Any]:
            reply = client.post(path, json=body)
            return reply.status_code, reply.json() if reply.status_code >= 400 else reply.text

        def loading(name: str, path: str, **more: Any) -> tuple[int, Any]:
            return call("/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)

        status, text = loading("deux", "two")
        assert (status, text) == (200, "Success: LoRA adapter 'deux' added successfully.")
        models = {each["id"]: each["parent"] for each in client.get("/v1/models").json()["data"]}
        assert models == {"base": None, "one": "base", "deux": "base"}
        assert client.get("/v1/models/deux").json()["id"] == "deux"
        tags = client.get("/api/tags").json()["models"]
        assert [each["details"]["parent_model"] for each in tags] == ["", "base", "base"]
        assert client.post("/api/show", json={"model": "deux:latest"}).json()["details"]["parent_model"]
        said = {"prompt": "a", "max_tokens": 2}
        assert client.post("/v1/completions", json={"model": "deux", **said}).json()["model"] == "deux"

        # what is wrong has OpenAI's shape, and names the field
        (folder / "adapters" / "link").unlink(missing_ok=True)
        (folder / "adapters" / "link").symlink_to(folder / "base")
        made(folder / "other", folder / "adapters" / "bad", 0, r=4, target_modules=["q_proj"])
        record = {"base": "other", "fingerprint": "0" * 64}
        (folder / "adapters" / "bad" / "xverse_base.json").write_text(json.dumps(record))
        made(folder / "base", folder / "adapters" / "high", 0, r=80, target_modules=["q_proj"])
        lies = shutil.copytree(folder / "adapters" / "one", folder / "adapters" / "lies", dirs_exist_ok=True)
        config = json.loads((lies / "adapter_config.json").read_text())
        (lies / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
        dora = shutil.copytree(folder / "adapters" / "one", folder / "adapters" / "dora", dirs_exist_ok=True)
        (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
        odd = shutil.copytree(folder / "adapters" / "one", folder / "adapters" / "odd", dirs_exist_ok=True)
        (odd / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": ["q_proj"]}))
        wrong = [
            (loading("x", "bad"), 400, "lora_path", "trained on other"),
            (loading("x", "high"), 400, "lora_path", "rank 80 is out of range (1 to 64"),
            (loading("x", "lies"), 400, "lora_path", "has rank 4 where adapter_config.json says 8"),
            (loading("x", "dora"), 400, "lora_path", "use_dora"),
            (loading("x", "odd"), 400, "lora_path", "rank_pattern is ['q_proj'], not an object"),
            (loading("x", "a" * 5000), 400, "lora_path", "not in the server's folder"),
            (loading("x", "nowhere"), 404, "lora_path", "does not exist"),
            (loading("x", "../base"), 400, "lora_path", "not in the server's folder"),
            (loading("x", str(folder / "base")), 400, "lora_path", "not in the server's folder"),
            (loading("x", "link"), 400, "lora_path", "not in the server's folder"),
            (loading("x", "a\0b"), 400, "lora_path", "not in the server's folder"),
            (loading("deux", "one"), 400, "lora_name", "already loaded"),
            (loading("base", "one"), 400, "lora_name", "already the name"),
            (loading("base:latest", "one"), 400, "lora_name", "already the name"),
            (loading("a b", "one"), 400, "lora_name", "not a name"),
            (call("/v1/load_lora_adapter", lora_path="one"), 400, "lora_name", "required"),
            (call("/v1/unload_lora_adapter", lora_name="x"), 404, "lora_name", "no adapter"),
            (call("/v1/completions", model="x", prompt="a"), 404, "model", "'base', 'deux', 'one'"),
        ]
        for (status, body), expected, param, text in wrong:
            assert (status, body["error"]["param"]) == (expected, param), body
            assert text in body["error"]["message"]
            if "not in the server's folder" not in text:  # that one repeats what the client has sent
                assert str(folder) not in body["error"]["message"]

        assert loading("deux", "one", load_inplace=True)[0] == 200
        served.runner.uses[served.adapted["one"].adapter] += 1  # as an open request counts
        status, body = call("/v1/unload_lora_adapter", lora_name="one")
        assert (status, body["error"]["code"]) == (409, "adapter_in_use")
        served.runner.uses[served.adapted["one"].adapter] -= 1
        for number in range(30):
            assert loading(f"n{number}", "one")[0] == 200
        status, body = loading("n31", "one")
        assert status == 400
        assert "32 adapters are loaded" in body["error"]["message"]
        assert call("/v1/unload_lora_adapter", lora_name="one")[0] == 200
        assert call("/v1/completions", model="one", prompt="a")[0] == 404
        assert call("/api/generate", model="one", prompt="a")[1] == {"error": "model 'one' not found"}
        served.adapter_folder = None
        assert loading("x", "one")[0] == call("/v1/unload_lora_adapter", lora_name="n1")[0] == 403


def test_an_open_request_keeps_its_adapter_loaded(folder: Path) -> None:
    served = service(folder, ["one"])

    async def run() -> tuple[Any, Any]:
        app = InProcess(served)
        async with app.running():
            body = {"model": "one", "prompt": "a", "max_tokens": 400, "ignore_eos": True}
            reply = asyncio.create_task(app.call("/v1/completions", body))
            while not served.runner.open:
                await asyncio.sleep(0.001)
            refused = await app.call("/v1/unload_lora_adapter", {"lora_name": "one"})
            reply.cancel()
            await asyncio.gather(reply, return_exceptions=True)
            return refused, dict(served.runner.uses)  # entries would keep unloaded adapters in memory

    (status, _, body), uses = asyncio.run(run())
    assert (status, body["error"]["code"], uses) == (409, "adapter_in_use", {})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["one", "two=D"], "give each of several adapters a name"),
        (["a=D", "a=E"], "given twice"),
        (["a b=D"], "not a name"),
        ([f"n{number}=D" for number in range(33)], "33 adapters are too many"),
        (["a=/nowhere"], "no such adapter directory"),
    ],
)
def test_wrong_flags_are_refused(folder: Path, given: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        load_service(ServiceSettings(model=str(folder / "base"), adapter=given))


def test_chat_switches_adapters(folder: Path) -> None:
    import io

    from xverse.chat.session import load_session
    from xverse.chat.terminal import Terminal

    given = [f"{name}={folder / 'adapters' / name}" for name in ("one", "two")]
    overrides = {"temperature": 0.0, "max_new_tokens": 8}
    session = load_session(str(folder / "base"), overrides, adapter=given, notify=lambda text: None)
    assert session.adapter == "one"
    typed = "hello\n/reset\n/adapter two\nhello\n/reset\n/adapter none\nhello\n/reset\n/adapter one\nhello\n"
    out = io.StringIO()
    assert Terminal(session, io.StringIO(typed + "/adapter thre\n"), out).run() == 2
    first, second, third, fourth = out.getvalue().splitlines()
    assert first == fourth
    assert len({first, second, third}) == 3
