"""The longer parts of ``check.py``: the engine, a training step, transformers' ``generate``."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Bench:
    """Where to measure, and the facts so far."""

    device: torch.device
    tiny: bool
    seconds: int
    facts: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def say(self, part: str, **values: Any) -> None:
        """Record a fact and print it as a JSON line."""
        fact = {
            "part": part,
            **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()},
        }
        self.facts.append(fact)
        print(json.dumps(fact), flush=True)

    def now(self) -> float:
        """The time at which the device has finished everything."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, action: Callable[[], Any], times: int) -> float:
        """Seconds of a call, after two that are not counted."""
        times = 1 if self.tiny else times
        action()
        action()
        begun = self.now()
        for _ in range(times):
            action()
        return (self.now() - begun) / times

    def peak(self) -> dict[str, float]:
        """The peak of memory since the last call, in GB."""
        if not self.cuda:
            return {}
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"peak_gb": peak}

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def _shape(bench: Bench, layers: int) -> Any:
    from xverse.model import SHAPES

    return dataclasses.replace(SHAPES["nano" if bench.tiny else "7b"], num_hidden_layers=layers)


def engine(bench: Bench) -> None:
    """Decoding and prefill of the 7B shape by weights, cache and batch, compared with the memory rate."""
    from xverse.bench.weights import placeholder_tokenizer, random_model
    from xverse.engine import Engine, Request, SamplingParams
    from xverse.hardware import bandwidth_buffer, read_bandwidth

    rate = read_bandwidth(bandwidth_buffer(str(bench.device))) if bench.cuda else None
    config = _shape(bench, 2 if bench.tiny else 32)
    tokenizer = placeholder_tokenizer(config.vocab_size)
    steps = 2 if bench.tiny else 20
    for kind, kv_dtype in (("bf16", "auto"), ("int8", "auto"), ("int4", "auto"), ("bf16", "int8")):
        model = random_model(config, torch.bfloat16, None if kind == "bf16" else kind).to(bench.device)
        weights = sum(x.nbytes for x in model.state_dict().values())
        weights -= model.model.embed_tokens.weight.nbytes
        options: dict[str, Any] = {"max_cache_tokens": 1024} if bench.tiny else {}
        runner = Engine(model, tokenizer, kv_dtype=kv_dtype, prefix_cache_bytes=0, **options)
        bench.say(
            "engine", weights=kind, cache=kv_dtype, weights_gb=weights / 1e9, tokens=runner.max_cache_tokens
        )
        vector = config.head_dim + 4 if kv_dtype == "int8" else 2 * config.head_dim
        position = 2 * config.num_hidden_layers * config.num_attention_heads * vector
        for batch, length in ((1, 20), (3, 20)) if bench.tiny else ((1, 512), (64, 512), (64, 1024)):
            prompts = [
                [(row * 7919 + 31 * i) % (config.vocab_size - 300) + 270 for i in range(length)]
                for row in range(batch)
            ]
            sampling = SamplingParams.greedy(3 * steps)
            begun = bench.now()
            handles = [
                runner.submit(Request(prompt_ids=ids, sampling=sampling, stop_ids=(10**6,)))
                for ids in prompts
            ]
            waiting = set(handles)
            while waiting:
                waiting -= {event.handle for event in runner.step()}
            prefill = bench.now() - begun
            for _ in range(3):
                runner.step()
            begun = bench.now()
            for _ in range(steps):
                runner.step()
            step = (bench.now() - begun) / steps
            moved = weights + batch * length * position
            bench.say(
                "decode", weights=kind, cache=kv_dtype, batch=batch, length=length, ms=1e3 * step,
                tokens_s=batch / step, share_of_memory=moved / step / rate if rate else None,
                prefill_tokens_s=batch * length / prefill, **bench.peak(),
            )  # fmt: skip
            for handle in handles:
                runner.cancel(handle)
        del runner, model
        bench.free()


def train(bench: Bench) -> None:
    """A training step of the 7B's layers in rows of 8,192 tokens, compared with the peak of the device."""
    from xverse.data.feed import Batch
    from xverse.model import XverseForCausalLM
    from xverse.train.loop import TrainConfig, train_step
    from xverse.train.optimizer import make_optimizer
    from xverse.train.parallel import World, distribute
    from xverse.train.report import peak_of

    shape, length = _shape(bench, 1 if bench.tiny else 8), 128 if bench.tiny else 8192
    for how, options in (
        ("eager", {}),
        ("compiled", {"compile": True}),
        ("compiled, recomputed", {"compile": True, "activation_checkpointing": "full"}),
    ):
        if options and not bench.cuda:
            continue
        config = TrainConfig(steps=9, batch_size=1, learning_rate=1e-4, **options)
        with torch.device(bench.device):
            model = XverseForCausalLM(shape)
        replica = distribute(model, config, World(device=bench.device))
        optimizer = make_optimizer(replica.model, config)
        tokens = torch.randint(300, shape.vocab_size, (1, length + 1))
        for documents in (1, 16):
            ids = torch.arange(documents).repeat_interleave(length // documents)[None].int()
            batch = Batch(tokens[:, :-1], tokens[:, 1:], ids)

            def step(replica: Any = replica, optimizer: Any = optimizer, batch: Any = batch) -> None:
                train_step(replica, batch, config)  # noqa: B023 (called before the next configuration)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            seconds = bench.timed(step, 3)
            flops, peak = shape.flops_per_token(length), peak_of(bench.device, None)
            bench.say(
                "training step", how=how, layers=shape.num_hidden_layers, documents=documents,
                ms=1e3 * seconds, tokens_s=length / seconds,
                mfu_causal=flops["causal"] * length / seconds / peak.flops if peak else None, **bench.peak(),
            )  # fmt: skip
        del replica, optimizer, model
        bench.free()


def generate(bench: Bench) -> None:
    """transformers' ``generate`` on the README's lines: plain, ``quantize(8)``, ``quantize(4)``."""
    from xverse.hf import XverseConfig, XverseForCausalLM

    shape, new = _shape(bench, 2 if bench.tiny else 8), 4 if bench.tiny else 32
    for bits in (16, 8, 4):
        with torch.device(bench.device), _default_dtype(torch.bfloat16):
            model = XverseForCausalLM(XverseConfig.from_model_config(shape)).eval()
        begun = bench.now()
        if bits < 16:
            model = model.quantize(bits).to(bench.device)
        quantised = bench.now() - begun
        ids = torch.randint(300, shape.vocab_size, (1, 20 if bench.tiny else 200), device=bench.device)

        def run(model: Any = model, ids: Any = ids) -> None:
            model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=1)

        begun = bench.now()
        run()
        first = bench.now() - begun
        begun = bench.now()
        run()
        again = bench.now() - begun
        bench.say(
            "generate", bits=bits, layers=shape.num_hidden_layers, quantise_s=quantised,
            first_ms=1e3 * first / new, again_ms=1e3 * again / new, **bench.peak(),
        )  # fmt: skip
        del model, run
        bench.free()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
