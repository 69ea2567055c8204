"""Backends that score prompts: the engine, or any causal language model of transformers."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.device import compute_device, weights_dtype
from xverse.engine import Engine
from xverse.engine.load import ending_ids, load_engine
from xverse.eval.any_model import load_any
from xverse.eval.continuing import Continuations
from xverse.eval.scoring import ScoreItem
from xverse.formats import ModelDirectory
from xverse.model.config import FLOAT32_BELOW
from xverse.model.families import FAMILIES

_LEAST_SHARED = 16  # tokens; less is not worth a cache


class EngineBackend:
    """Scores with the engine, whose prefix cache computes a common beginning of prompts once."""

    def __init__(self, engine: Engine, name: str, stop_ids: Sequence[int] = ()) -> None:
        self.name = name
        self.engine = engine
        self.stop_ids = tuple(stop_ids)
        self.context = engine.context_length
        self.dtype = str(next(engine.model.parameters()).dtype).removeprefix("torch.")

    @classmethod
    def load(
        cls, model: str | ModelDirectory, *, quantize: str | None, threads: int | None, **settings: Any
    ) -> EngineBackend:
        """Load a model. Raises UserError where that is not possible."""
        directory = ModelDirectory.named(model)
        loaded = load_engine(directory, quantize=quantize, threads=threads, max_batch=32, **settings)
        return cls(loaded.engine, directory.name, loaded.stop_ids)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        first = self.engine.tokenizer.prefix_ids
        return [[*first, *ids] for ids in self.engine.tokenizer.encode_batch(texts)]

    def score(
        self, items: Sequence[ScoreItem], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        scores = self.engine.score(items, progress)
        return [[sum(logprobs) for logprobs in continuations] for continuations in scores]


class TransformersBackend:
    """Scores with a model of transformers; ``encode`` maps text to ids.

    The longest common prefix of a batch is computed once, and its cache is copied for every row. Models whose
    cache cannot be copied or continued compute whole prompts.
    """

    def __init__(
        self,
        model: Any,
        encode: Callable[[str], list[int]],
        *,
        name: str,
        context: int,
        share: bool = True,
        batch_tokens: int = 4096,
        directory: ModelDirectory | None = None,
    ) -> None:
        self.name, self.context, self._directory = name, context, directory
        self.shares = share
        self._model, self._encode, self._batch_tokens = model, encode, batch_tokens
        self._chooses = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")

    @classmethod
    def load(
        cls, model: str | ModelDirectory, *, threads: int | None = None, device: str = "auto"
    ) -> TransformersBackend:
        """Load XVERSE in this project's transformers class, or any causal language model of transformers, on
        ``device``. Raises UserError where that is not possible."""
        chosen = compute_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        directory = ModelDirectory.named(model)
        if not directory.path.is_dir():
            raise UserError(f"{directory}: --backend transformers needs a directory; omit it")
        loaded: Any
        encode: Callable[..., list[int]]
        if directory.model_type == "xverse":
            from xverse.hf import XverseForCausalLM

            tokenizer, config = directory.tokenizer, directory.config
            loaded = XverseForCausalLM.from_pretrained(
                directory.plain_path, dtype=_dtype(config.num_parameters(), chosen)
            )
            encode, context = tokenizer.encode, config.context_length
        else:
            loaded, encode, context = load_any(directory)
            parameters = sum(parameter.numel() for parameter in loaded.parameters())
            loaded = loaded.to(_dtype(parameters, chosen) or loaded.dtype)
        return cls(
            loaded.eval().to(chosen), encode, name=directory.name, context=context, directory=directory
        )

    @functools.cached_property
    def engine(self) -> Continuations:
        """The model for generating tasks. Raises UserError if its tokenizer is of an unsupported kind."""
        assert self._directory is not None
        tokenizer = self._directory.unchecked_tokenizer
        return Continuations(self._model, tokenizer, self.context, self.score)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a reply."""
        assert self._directory is not None
        generation = self._directory.generation_config
        return ending_ids(generation, self._model.config.eos_token_id, self.engine.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def score(
        self, items: Sequence[ScoreItem], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        results: list[list[float]] = [[] for _ in items]
        # One forward pass of the prompt scores all continuations of one token; longer ones need a row each.
        rows: list[tuple[int, int | None, list[int]]] = []
        for index, (ids, continuations) in enumerate(items):
            results[index] = [0.0] * len(continuations)
            if all(len(continuation) == 1 for continuation in continuations):
                rows.append((index, None, ids))
            else:
                rows += [(index, n, [*ids, *tokens[:-1]]) for n, tokens in enumerate(continuations)]
        done: set[int] = set()
        common = 0
        if self.shares and len(rows) > 1:  # the last token of a prompt stays: its logits are needed
            common = min(_common([ids for _, _, ids in rows]), min(len(ids) for ids, _ in items) - 1)
        prefix = self._prefix(rows[0][2][:common]) if common >= _LEAST_SHARED else None
        start = common if prefix is not None else 0
        for batch in _batches(rows, start, self._batch_tokens):
            counts = [1 if number is None else len(items[index][1][number]) for index, number, _ in batch]
            logprobs = self._forward([ids[start:] for _, _, ids in batch], counts, prefix, start)
            for (index, number, _), scores in zip(batch, logprobs, strict=True):
                continuations = items[index][1]
                if number is None:
                    results[index] = [scores[0, tokens[0]].item() for tokens in continuations]
                else:
                    places = torch.arange(len(scores))
                    results[index][number] = scores[places, torch.tensor(continuations[number])].sum().item()
                done.add(index)
            if progress is not None:
                progress(len(done))
        return results

    @torch.inference_mode()
    def _prefix(self, ids: list[int]) -> Any:
        """The cache of a common prefix; None if this model's cache cannot be shared."""
        try:
            device = next(self._model.parameters()).device
            cache = self._model(torch.tensor([ids], device=device), use_cache=True).past_key_values
            again = copy.deepcopy(cache)
            again.batch_repeat_interleave(2)
            if cache.get_seq_length() != len(ids):  # sliding window
                raise ValueError("the cache does not hold the whole prefix")
        except (AttributeError, TypeError, ValueError, NotImplementedError):
            self.shares = False
            return None
        return cache

    @torch.inference_mode()
    def _forward(self, texts: list[list[int]], counts: list[int], prefix: Any, start: int) -> list[Tensor]:
        """For each text log-probabilities float32 [count, V] after its last ``count`` tokens.

        Padding is on the right, where causal attention does not see it.
        """
        device = next(self._model.parameters()).device
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros(len(texts), start + longest, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : start + len(text)] = 1
        settings: dict[str, Any] = {"attention_mask": mask.to(device), "use_cache": prefix is not None}
        if prefix is not None:
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(texts))
            settings["past_key_values"] = cache
        spans = [range(len(text) - count, len(text)) for text, count in zip(texts, counts, strict=True)]
        places = list(range(longest))
        if self._chooses:  # with a large vocabulary the logits dominate the cost
            places = sorted({place for span in spans for place in span})
            settings["logits_to_keep"] = torch.tensor(places, device=device)
        logits = self._model(ids.to(device), **settings).logits  # [B, places, V]
        at = {place: number for number, place in enumerate(places)}
        return [
            row[[at[place] for place in span]].float().log_softmax(-1).cpu()
            for row, span in zip(logits, spans, strict=True)
        ]


def load_backend(
    model: str,
    *,
    which: str | None,
    quantize: str | None,
    threads: int | None,
    kv_dtype: str,
    device: str = "auto",
    tensor_parallel: int = 1,
) -> EngineBackend | TransformersBackend:
    """``which``: ``engine`` or ``transformers``; None: the engine for models that it runs."""
    directory = ModelDirectory.named(model)
    which = which or ("engine" if _runs_in_engine(directory) else "transformers")
    if which == "engine":
        settings = {"kv_dtype": kv_dtype, "device": device, "tensor_parallel": tensor_parallel}
        return EngineBackend.load(directory, quantize=quantize, threads=threads, **settings)
    if quantize is not None or kv_dtype != "auto" or tensor_parallel > 1:
        raise UserError(
            "--quantize, --kv-dtype and --tensor-parallel need the engine; this model is scored with "
            "transformers"
        )
    return TransformersBackend.load(directory, threads=threads, device=device)


def _dtype(parameters: int, device: torch.device) -> torch.dtype | None:
    """The engine's: that of the device; on a CPU float32 for small models, None (as stored) for others."""
    return weights_dtype(device) or (torch.float32 if parameters < FLOAT32_BELOW else None)


def _runs_in_engine(directory: ModelDirectory) -> bool:
    """Whether the model is XVERSE, a GGUF file, or of a family and with features that the engine has."""
    if directory.model_type == "xverse" or not directory.path.is_dir():
        return True
    try:
        return bool(directory.config) and directory.model_type in FAMILIES
    except UserError:
        return False


def _common(rows: Sequence[list[int]]) -> int:
    """The length of the longest common prefix of all rows that leaves at least one id of each."""
    first, last = min(rows), max(rows)  # all rows share the common prefix of these two
    most = min(map(len, rows)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def _batches(
    rows: Sequence[tuple[int, int | None, list[int]]], start: int, most: int
) -> list[list[tuple[int, int | None, list[int]]]]:
    """Rows sorted by length, in batches of at most ``most`` tokens including padding."""
    batches: list[list[tuple[int, int | None, list[int]]]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: len(row[2])):
        longest = max(longest, len(row[2]) - start)
        if batches and (len(batches[-1]) + 1) * longest <= most:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = len(row[2]) - start
    return batches
