"""``xverse serve --adapter``, merged into plain weights and next to quantised ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from xverse.engine import Request, SamplingParams
from xverse.engine.load import load_engine
from xverse.formats import load_model, save_hf
from xverse.model.transformer import XverseForCausalLM, init_weights

peft = pytest.importorskip("peft")


@pytest.fixture
def adapted(wide_config: Any, tiny_tokenizer: Any, tmp_path: Path) -> tuple[str, str]:
    """A base model and an adapter that changes its replies."""
    model = XverseForCausalLM(wide_config)
    init_weights(model, seed=0)
    save_hf(model, tiny_tokenizer, tmp_path / "base", torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"])
    made = peft.get_peft_model(load_model(tmp_path / "base"), config)
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    made.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "base"), str(tmp_path / "adapter")


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_it_answers_with_the_adapter(adapted, quantize) -> None:
    from starlette.testclient import TestClient

    from xverse.serve.app import create_app
    from xverse.serve.start import ServiceSettings, load_service

    base, adapter = adapted
    settings = ServiceSettings(model=base, adapter=adapter, name="own", quantize=quantize)
    ids = [5, 300, 301, 302]
    request = Request(prompt_ids=ids, sampling=SamplingParams.greedy(8), stop_ids=(3,))
    expected, without = (
        "".join(
            event.text for event in load_engine(base, quantize=quantize, adapter=a).engine.stream(request)
        )
        for a in (adapter, None)
    )
    assert expected != without
    with TestClient(create_app(load_service(settings), None), base_url="http://127.0.0.1") as client:
        body = {"model": "own", "prompt": ids, "max_tokens": 8, "temperature": 0}
        body["repetition_penalty"] = 1.0
        reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["text"] == expected
