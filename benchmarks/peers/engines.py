"""One interface to three engines: submit prompts, decode a number of steps, return the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Prompts = list[list[int]]


class Runner(Protocol):
    """A step reads ``weight_bytes``, and ``position_bytes`` per position in the cache."""

    weight_bytes: int
    position_bytes: int
    notes: str

    def start(self, prompts: Prompts) -> float:
        """Prefill prompts of equal length up to the first new token of each; returns seconds."""
        ...

    def decode(self, steps: int) -> float:
        """Decode ``steps`` more tokens of each prompt greedily; returns seconds."""
        ...

    def stop(self) -> None: ...

    def logits(self, prompt: list[int]) -> list[float]:
        """The logits after ``prompt``."""
        ...


class Xverse:
    """This project's engine. ``weights``: ``int4``, ``int8`` or ``bf16``, converted from the directory's."""

    def __init__(self, path: str, weights: str, threads: int, tokens: int) -> None:
        import torch

        from xverse.bench.weights import placeholder_tokenizer
        from xverse.engine import Engine
        from xverse.engine.cache import position_bytes
        from xverse.formats import load_model
        from xverse.formats.quantize import load_quantizing

        torch.set_num_threads(threads)
        if weights == "bf16":
            model = load_model(path, torch.bfloat16)
        else:
            model = load_quantizing(Path(path), weights, torch.bfloat16)
        tokenizer = placeholder_tokenizer(model.config.vocab_size)
        # No prefix cache, so that rounds are independent.
        self._engine = Engine(model, tokenizer, max_batch=8, max_cache_tokens=tokens, prefix_cache_bytes=0)
        tensors = sum(tensor.nbytes for tensor in model.state_dict().values())
        embedding = sum(tensor.nbytes for tensor in model.model.embed_tokens.state_dict().values())
        self.weight_bytes = tensors - embedding
        self.position_bytes = position_bytes(model.config, torch.bfloat16)
        self.notes = "prefill in chunks of 512, KV bfloat16"
        self._handles: list[int] = []

    def start(self, prompts: Prompts) -> float:
        from xverse.engine import Request, SamplingParams

        requests = [
            Request(prompt_ids=ids, sampling=SamplingParams.greedy(400), stop_ids=()) for ids in prompts
        ]
        begin = time.perf_counter()
        self._handles = [self._engine.submit(request) for request in requests]
        started: set[int] = set()
        while len(started) < len(prompts):
            started |= {event.handle for event in self._engine.step()}
        return time.perf_counter() - begin

    def decode(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            assert len(self._engine.step()) == len(self._handles)
        return time.perf_counter() - begin

    def stop(self) -> None:
        for handle in self._handles:
            self._engine.cancel(handle)

    def logits(self, prompt: list[int]) -> list[float]:
        import torch

        from xverse.model.attention import FullCausal

        with torch.inference_mode():
            return self._engine.model(torch.tensor([prompt]), FullCausal(1, len(prompt)))[0, -1].tolist()


class LlamaCpp:
    """llama.cpp through the C interface of ``llama-cpp-python``, without the overhead of its wrapper."""

    def __init__(self, path: str, weights: str, threads: int, tokens: int) -> None:
        import gguf
        import llama_cpp

        self._c = llama_cpp
        # Otherwise it lists every tensor on stderr.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        file = str(Path(path) / f"{weights}.gguf")
        self._model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        reader = gguf.GGUFReader(file)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        self.weight_bytes = sum(sizes.values()) - sizes["token_embd.weight"]
        heads = llama_cpp.llama_model_n_embd(self._model) * llama_cpp.llama_model_n_layer(self._model)
        self.position_bytes = 2 * 2 * heads  # keys and values in float16
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self._context: Any = None
        self._seconds: dict[bool, float] = {}
        prompt = [[(7 * n) % 1000 + 300 for n in range(64)]]
        for flash in (True, False, True, False):  # the first two are warm-up
            self._open(threads, tokens, flash)
            self._seconds[flash] = self.start(prompt) + self.decode(4)
        self._flash = self._seconds[True] <= self._seconds[False]
        self._open(threads, tokens, self._flash)
        self.notes = f"n_batch 512, KV float16, flash attention {'on' if self._flash else 'off'} (the faster)"

    def _open(self, threads: int, tokens: int, flash: bool) -> None:
        c = self._c
        if self._context:
            c.llama_free(self._context)
        settings = c.llama_context_default_params()
        settings.n_ctx = tokens
        settings.n_seq_max = 8
        settings.kv_unified = True  # otherwise each sequence is limited to an eighth of the context
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = (
            c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = c.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp has no room for a context of {tokens} tokens")

    def start(self, prompts: Prompts) -> float:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        begin = time.perf_counter()
        self._length = len(prompts[0])
        flat = [
            (token, at, sequence, at == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for at, token in enumerate(ids)
        ]
        self._next = []
        for start in range(0, len(flat), 512):
            self._next += self._run(flat[start : start + 512])
        return time.perf_counter() - begin

    def decode(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            places = [(token, self._length, sequence, True) for sequence, token in enumerate(self._next)]
            self._next = self._run(places)
            self._length += 1
        return time.perf_counter() - begin

    def _run(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (token, position, sequence, whether to compute logits); returns the best tokens."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        with_logits = []
        for index, (token, position, sequence, last) in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = last
            if last:
                with_logits.append(index)
        status = self._c.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama_decode failed with {status}")
        return [int(self._row(index).argmax()) for index in with_logits]

    def _row(self, index: int) -> Any:
        row = self._c.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(row, shape=(self._vocab_size,))

    def stop(self) -> None:
        pass

    def logits(self, prompt: list[int]) -> list[float]:
        self.start([prompt])
        return self._row(len(prompt) - 1).tolist()


class Transformers:
    """transformers' Llama in bfloat16 with its cache, one sequence."""

    def __init__(self, path: str, weights: str, threads: int, tokens: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from xverse.formats import ModelDirectory

        torch.set_num_threads(threads)
        values = {**ModelDirectory.of(Path(path)).config.to_json(), "model_type": "llama"}
        self._model = LlamaForCausalLM.from_pretrained(
            path, config=LlamaConfig(**values), dtype=torch.bfloat16
        ).eval()
        state = self._model.state_dict()
        self.weight_bytes = sum(t.nbytes for name, t in state.items() if "embed_tokens" not in name)
        config = self._model.config
        self.position_bytes = 4 * config.num_hidden_layers * config.hidden_size
        self.notes = f"{type(self._model).__name__}, {config._attn_implementation} attention"

    def start(self, prompts: Prompts) -> float:
        import torch

        (ids,) = prompts
        begin = time.perf_counter()
        with torch.inference_mode():
            output = self._model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache, self._next = output.past_key_values, output.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin

    def decode(self, steps: int) -> float:
        import torch

        begin = time.perf_counter()
        with torch.inference_mode():
            for _ in range(steps):
                output = self._model(self._next, past_key_values=self._cache, use_cache=True)
                self._cache, self._next = output.past_key_values, output.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin

    def stop(self) -> None:
        self._cache = None

    def logits(self, prompt: list[int]) -> list[float]:
        import torch

        with torch.inference_mode():
            return self._model(torch.tensor([prompt])).logits[0, -1].tolist()


ENGINES: dict[str, Callable[[str, str, int, int], Runner]] = {
    "xverse": Xverse,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}
