"""What scores: this project's engine, or any causal language model of transformers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xverse.config import UserError
from xverse.data.benchmarks.questions import json_file
from xverse.engine import Engine
from xverse.engine.load import load_engine
from xverse.eval.scoring import Item
from xverse.formats import load_tokenizer, read_config, resolve
from xverse.model.config import FLOAT32_BELOW

_LEAST_SHARED = 16  # tokens; less is not worth a cache


class EngineBackend:
    """What prompts have in common at their beginning is computed once: the engine's prefix cache finds it."""

    def __init__(self, engine: Engine, name: str, stop_ids: Sequence[int] = ()) -> None:
        self.name = name
        self.engine = engine
        self.stop_ids = tuple(stop_ids)
        self.context = engine.model.config.context_length
        self.dtype = str(next(engine.model.parameters()).dtype).removeprefix("torch.")

    @classmethod
    def load(cls, model: str, *, quantize: str | None, threads: int | None, **settings: Any) -> EngineBackend:
        """Raises UserError for what cannot be loaded."""
        loaded = load_engine(model, quantize=quantize, threads=threads, max_batch=32, **settings)
        return cls(loaded.engine, model, loaded.stop_ids)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.engine.tokenizer.encode_batch(texts)

    def score(
        self, items: Sequence[Item], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        return [[sum(each) for each in found] for found in self.engine.score(items, progress)]


class TransformersBackend:
    """``encode``: text to ids. The longest common beginning of a batch is computed once and its cache given
    to all; a model whose cache cannot be copied or continued computes whole prompts."""

    def __init__(
        self,
        model: Any,
        encode: Callable[[str], list[int]],
        *,
        name: str,
        context: int,
        share: bool = True,
        batch_tokens: int = 4096,
    ) -> None:
        self.name, self.context = name, context
        self.shares = share
        self._model, self._encode, self._batch_tokens = model, encode, batch_tokens
        self._chooses = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")

    @classmethod
    def load(cls, model: str, *, threads: int | None = None) -> TransformersBackend:
        """XVERSE in our transformers class, or another model of XVERSE's tables in one of transformers' own,
        on a GPU where there is one. Raises UserError for what cannot be loaded."""
        if threads is not None:
            torch.set_num_threads(threads)
        path = resolve(model)
        if model_type(path) == "xverse":
            from xverse.hf import XverseForCausalLM

            tokenizer = load_tokenizer(path)
            found: Any = XverseForCausalLM.from_pretrained(
                path, dtype=_dtype(read_config(path).num_parameters())
            )
            return cls(_placed(found), tokenizer.encode, name=model, context=read_config(path).context_length)
        from xverse.formats.foreign import load_foreign

        foreign = load_foreign(path)
        parameters = sum(each.numel() for each in foreign.model.parameters())
        loaded: Any = foreign.model
        loaded = loaded.to(_dtype(parameters) or loaded.dtype)
        first, encode = list(foreign.tokenizer.bos_ids), foreign.tokenizer.encode
        context = _context(loaded.config)
        return cls(_placed(loaded), lambda text: [*first, *encode(text)], name=model, context=context)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def score(
        self, items: Sequence[Item], progress: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        results: list[list[float]] = [[] for _ in items]
        # Continuations of one token are read off the prompt's last place; others need a row each.
        rows: list[tuple[int, int | None, list[int]]] = []
        for index, (ids, continuations) in enumerate(items):
            results[index] = [0.0] * len(continuations)
            if all(len(continuation) == 1 for continuation in continuations):
                rows.append((index, None, ids))
            else:
                rows += [(index, n, [*ids, *each[:-1]]) for n, each in enumerate(continuations)]
        done: set[int] = set()
        common = 0
        if self.shares and len(rows) > 1:  # a prompt's last token stays: what follows it is wanted
            common = min(_common([ids for _, _, ids in rows]), min(len(ids) for ids, _ in items) - 1)
        prefix = self._prefix(rows[0][2][:common]) if common >= _LEAST_SHARED else None
        start = common if prefix is not None else 0
        for batch in _batches(rows, start, self._batch_tokens):
            wanted = [1 if number is None else len(items[index][1][number]) for index, number, _ in batch]
            logprobs = self._forward([ids[start:] for _, _, ids in batch], wanted, prefix, start)
            for (index, number, _), found in zip(batch, logprobs, strict=True):
                continuations = items[index][1]
                if number is None:
                    results[index] = [found[0, each[0]].item() for each in continuations]
                else:
                    places = torch.arange(len(found))
                    results[index][number] = found[places, torch.tensor(continuations[number])].sum().item()
                done.add(index)
            if progress is not None:
                progress(len(done))
        return results

    @torch.inference_mode()
    def _prefix(self, ids: list[int]) -> Any:
        """The cache of a common beginning, or None where this model's cannot be shared."""
        try:
            device = next(self._model.parameters()).device
            found = self._model(torch.tensor([ids], device=device), use_cache=True).past_key_values
            again = copy.deepcopy(found)
            again.batch_repeat_interleave(2)
            if found.get_seq_length() != len(ids):  # a window that forgets
                raise ValueError("the cache does not hold the whole text")
        except (AttributeError, TypeError, ValueError, NotImplementedError):
            self.shares = False
            return None
        return found

    @torch.inference_mode()
    def _forward(self, texts: list[list[int]], wanted: list[int], prefix: Any, start: int) -> list[Tensor]:
        """Log-probabilities float32 [W, V] behind the last ``wanted`` tokens of each text. Padding stands at
        the right, where causal attention does not see it."""
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
        spans = [range(len(text) - count, len(text)) for text, count in zip(texts, wanted, strict=True)]
        places = list(range(longest))
        if self._chooses:  # of a large vocabulary the logits are most of the work
            places = sorted({place for span in spans for place in span})
            settings["logits_to_keep"] = torch.tensor(places, device=device)
        logits = self._model(ids.to(device), **settings).logits  # [B, places, V]
        at = {place: number for number, place in enumerate(places)}
        return [
            row[[at[place] for place in span]].float().log_softmax(-1).cpu()
            for row, span in zip(logits, spans, strict=True)
        ]


def load_backend(
    model: str, *, which: str | None, quantize: str | None, threads: int | None, kv_dtype: str
) -> EngineBackend | TransformersBackend:
    """``which``: ``engine`` or ``transformers``; None: the engine for XVERSE, transformers for others."""
    which = which or ("engine" if model_type(resolve(model)) == "xverse" else "transformers")
    if which == "engine":
        return EngineBackend.load(model, quantize=quantize, threads=threads, kv_dtype=kv_dtype)
    if quantize is not None or kv_dtype != "auto":
        raise UserError(
            "--quantize and --kv-dtype belong to the engine; this model is scored by transformers"
        )
    return TransformersBackend.load(model, threads=threads)


def model_type(path: Path) -> str:
    """As config.json says; raises UserError where it does not."""
    return str(json_file(path / "config.json").get("model_type"))


def _dtype(parameters: int) -> torch.dtype | None:
    """Small models in float32, others as they are stored."""
    return torch.float32 if parameters < FLOAT32_BELOW else None


def _placed(model: Any) -> Any:
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _context(config: Any) -> int:
    """How long a text may be; configs have several names for it."""
    for name in ("max_position_embeddings", "seq_length", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise UserError("config.json does not say how long the model's context is")


def _common(rows: Sequence[list[int]]) -> int:
    """How many ids all rows begin with; at least one of each is left over."""
    first, last = min(rows), max(rows)  # what these two share, all that lie between them begin with, too
    most = min(map(len, rows)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def _batches(
    rows: Sequence[tuple[int, int | None, list[int]]], start: int, most: int
) -> list[list[tuple[int, int | None, list[int]]]]:
    """Neighbours of like length, at most ``most`` tokens with their padding."""
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
