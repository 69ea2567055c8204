"""A model that recites a text, so that its replies are known."""

from __future__ import annotations

import torch

from xverse.model import XverseConfig, XverseForCausalLM, init_weights
from xverse.tokenizer import Tokenizer

# Chinese, right-to-left letters, a joined emoji, and one emoji that the tokenizer has only as bytes.
RECITED = "你好，世界👩\u200d💻مرحبا👋שלום"
POSITIONS = 400


def reciter(
    tokenizer: Tokenizer, text: str, positions: int = POSITIONS, endless: bool = False
) -> XverseForCausalLM:
    """A model that generates ``text`` after "Assistant: " or "Say ", whatever the context.

    Attention and MLP add nothing; each token's embedding points at its successor's row of the head.
    """
    script = tokenizer.encode(text)
    starts = [tokenizer.encode("Assistant: ")[-1], tokenizer.encode("Say")[-1]]
    assert len({*script, *starts}) == len(script) + 2, "a token cannot have two successors"
    config = XverseConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        max_tokenizer_truncation=positions,
    )
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    end = script[0] if endless else tokenizer.eos_id
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.zero_()
        for token, successor in [
            *((start, script[0]) for start in starts),
            *zip(script, [*script[1:], end], strict=True),
        ]:
            model.lm_head.weight[successor] += embedding[token]  # [D]
    return model
