"""Liger's norms and activations compute what the plain layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xverse.hf import XverseConfig, XverseForCausalLM

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_loss_and_its_gradients_stay(tiny_config: Any) -> None:
    pytest.importorskip("liger_kernel")
    from xverse.finetune.liger import use_liger

    torch.manual_seed(0)
    model = XverseForCausalLM(XverseConfig.from_model_config(tiny_config)).cuda().train()
    ids = torch.randint(4, tiny_config.vocab_size, (2, 40), device="cuda")
    found = []
    for step in range(2):
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        if not step:
            use_liger(model)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
