"""Continuations by a model of transformers, with what generating tasks use of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from xverse.eval.scoring import ScoreItem
from xverse.tokenizer import Tokenizer


class Continuations:
    """``model`` with its ``tokenizer``. Prompts are continued one after another, greedily. ``score`` as the
    backend's."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        context: int,
        score: Callable[[Sequence[ScoreItem]], list[list[float]]],
    ) -> None:
        from transformers import GenerationConfig

        self.tokenizer, self.context_length = tokenizer, context
        self._model, self._score = model, score
        model.generation_config = GenerationConfig()  # whose own penalties would change what is likeliest

    def score(self, items: Sequence[ScoreItem]) -> list[list[list[float]]]:
        """The log-probability of each continuation, as the only value of a list."""
        return [[[value] for value in values] for values in self._score(items)]

    def replies(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        stop: Sequence[str],
        progress: Callable[[int, int], None] | None,
    ) -> list[tuple[str, str]]:
        """As ``generate``."""
        replies = []
        for number, ids in enumerate(prompts):
            room = max(1, min(max_new_tokens, self.context_length - len(ids)))
            replies.append(self._reply(list(ids), room, set(stop_ids), tuple(stop)))
            if progress is not None:
                progress(number + 1, len(prompts))
        return replies

    @torch.inference_mode()
    def _reply(self, ids: list[int], room: int, ends: set[int], stop: tuple[str, ...]) -> tuple[str, str]:
        def ended(row: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            text = self.tokenizer.decode(row[0, len(ids) :].tolist())
            return torch.tensor([any(part in text for part in stop)], device=row.device)

        device = next(self._model.parameters()).device
        row = self._model.generate(
            torch.tensor([ids], device=device),
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
            stopping_criteria=[ended] if stop else None,
        )[0, len(ids) :].tolist()  # fmt: skip
        text, reason = "", "length"
        if row and row[-1] in ends:
            row, reason = row[:-1], "stop"
        text = self.tokenizer.decode(row)
        places = [at for part in stop if (at := text.find(part)) >= 0]
        return (text[: min(places)], "stop") if places else (text, reason)
