"""Replies of the model that is being trained, by the engine: many at once, prompts of a group computed once.

The engine computes with the trainer's own weights where these are whole, of the computing dtype and without
an adapter; others are merged, cast or gathered into copies that exist during generation only.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xverse.config import UserError
from xverse.engine import Engine, Request, SamplingParams
from xverse.finetune.rewards import Completion
from xverse.model.transformer import XverseForCausalLM
from xverse.tokenizer import Tokenizer

AT_ONCE = 64  # replies that are generated at the same time
_SEED_BITS = 31


def whole(tensor: Tensor) -> Tensor:
    """A parameter without gradient; one that FSDP shards is gathered, for which every process calls this."""
    return _full(tensor.detach())


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_model(trained: Any, dtype: torch.dtype | None = None) -> XverseForCausalLM:
    """The plain model with the weights of a transformers model, adapters merged, as ``dtype`` (None: theirs).

    Plain weights of that type are shared. Quantised layers and DoRA's are shared modules, adapters included.
    """
    base = trained.get_base_model() if hasattr(trained, "peft_config") else trained
    model = XverseForCausalLM.empty(base.config.to_model_config())
    for name, module in list(model.named_modules()):
        if not module._parameters:
            continue
        source = base.get_submodule(name)
        values = dict(_values(source))
        if not values:  # a quantised layer
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, source)
        for key, value in values.items():
            value = value if dtype is None else value.to(dtype)
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    return model


def _values(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The weight and the bias that ``module`` computes with; nothing if it has no plain weight."""
    if hasattr(module, "modules_to_save"):  # peft's copy of a module that is trained whole
        module = module.modules_to_save[module.active_adapters[0]]
    layer = getattr(module, "base_layer", None)
    rounded = getattr(module, "rounded", None)  # of quantisation-aware training
    if layer is None and rounded is not None:
        yield "weight", rounded().dequantize()
        if module.bias is not None:
            yield "bias", whole(module.bias)
        return
    if layer is None:
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            yield from ((key, whole(value)) for key, value in module.named_parameters(recurse=False))
        return
    if not isinstance(layer, nn.Linear) or any(module.use_dora.values()):
        return
    yield "weight", rounded().dequantize() if rounded is not None else merged_weight(module)
    if layer.bias is not None:
        yield "bias", whole(layer.bias)


def merged_weight(module: Any) -> Tensor:
    """The weight [N, K] of peft's linear layer plus its active adapters, to which gradients flow."""
    weight = whole(module.base_layer.weight)
    for name in module.active_adapters:
        if name in module.lora_A:
            down, up = (_full(part[name].weight) for part in (module.lora_A, module.lora_B))
            weight = weight + (up.float() @ down.float() * module.scaling[name]).to(weight.dtype)
    return weight


def seed_of(*parts: object) -> int:
    """The seed of one reply, a function of what identifies it."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


@dataclass(frozen=True)
class Generator:
    """Generates replies of at most ``sampling.max_new_tokens`` tokens to prompts of at most ``longest``.
    ``dtype`` None computes in that of the weights."""

    tokenizer: Tokenizer
    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    longest: int
    dtype: torch.dtype | None = None

    def __call__(
        self, trained: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[Completion]:
        """One reply to each of ``prompts``, in their order, drawn with its seed. Every process calls it, also
        without prompts. Raises UserError if memory does not suffice for a single reply."""
        was_training = trained.training
        with torch.no_grad():
            model = plain_model(trained, self.dtype)
        if not prompts:
            return []
        try:
            return self._run(model, prompts, seeds)
        finally:
            trained.train(was_training)  # the engine puts shared modules into evaluation mode
            if next(model.parameters()).device.type != "cpu":  # recorded steps refer to themselves
                del model
                gc.collect()

    def _engine(self, model: XverseForCausalLM, count: int) -> Engine:
        """An engine whose cache is gone, and with it what former weights computed, after this generation."""
        at_once = min(count, AT_ONCE)
        while True:
            tokens = at_once * (self.longest + self.sampling.max_new_tokens)
            try:
                return Engine(model, self.tokenizer, max_batch=at_once, max_cache_tokens=max(32, tokens))
            except UserError as error:
                if at_once == 1:
                    raise UserError(f"grpo: {error}; lower max_completion_length or cutoff_len") from None
                at_once //= 2

    def _run(
        self, model: XverseForCausalLM, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[Completion]:
        engine = self._engine(model, len(prompts))
        replies: dict[int, Completion] = {}
        for ids, seed in zip(prompts, seeds, strict=True):
            request = Request(
                prompt_ids=list(ids),
                sampling=replace(self.sampling, seed=seed),
                stop_ids=self.stop_ids,
                logprobs=0,
                tempered=True,
            )
            replies[engine.submit(request)] = Completion([], "", [], False)
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise UserError(f"grpo: a reply failed: {event.error}")
                reply = replies[event.handle]
                if event.token_id is not None:
                    assert event.logprob is not None
                    reply.ids.append(event.token_id)
                    reply.logprobs.append(event.logprob.logprob)
                reply.text += event.text
                reply.finished = event.finish_reason == "stop"
        return list(replies.values())
