"""The engine as a model of EleutherAI's lm-evaluation-harness, for tasks that this project does not have.

``import xverse.eval.harness`` registers it as the model ``xverse``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from xverse.engine import Request, SamplingParams
from xverse.eval.backends import EngineBackend
from xverse.eval.scoring import ScoreItem


@register_model("xverse")
class Harness(LM):
    """Arguments: ``model``, ``quantize``, ``threads``, ``device``, ``max_new_tokens``. Raises UserError for a
    model that cannot be loaded and a device that cannot be used."""

    def __init__(
        self,
        model: str = "nano",
        quantize: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        max_new_tokens: int = 256,
        **ignored: Any,  # batch_size, max_batch_size: the harness passes them to every model
    ) -> None:
        super().__init__()
        self._backend = EngineBackend.load(
            model,
            quantize=quantize,
            threads=None if threads is None else int(threads),
            device=device or "auto",
        )
        self._engine = self._backend.engine
        self._max_new_tokens = int(max_new_tokens)
        self._name = model

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        items = [self._divided(*request.args) for request in requests]
        return [scores[0] for scores in self._engine.score_likeliest(items)]

    def _divided(self, context: str, continuation: str) -> ScoreItem:
        """Ids of a context and its continuation, encoded together. As in the harness, trailing blanks of the
        context count to the continuation."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        tokenizer = self._engine.tokenizer
        whole = tokenizer.encode(context + continuation)
        size = len(tokenizer.encode(context))
        ids = whole[:size] or [tokenizer.eos_id]
        longest = self._backend.context
        rest = whole[size:]
        return ids[max(0, len(ids) + len(rest) - longest) :], [rest]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the context length without overlap."""
        results = []
        for request in requests:
            ids = self._engine.tokenizer.encode(request.args[0])
            length = self._backend.context - 1
            windows = [ids[begin : begin + length] for begin in range(0, len(ids), length)]
            items = [([self._engine.tokenizer.eos_id], [window]) for window in windows]
            results.append(sum(sum(scores[0]) for scores in self._engine.score(items)))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = ["" for _ in requests]
        handles = {}
        for index, request in enumerate(requests):
            context, settings = request.args
            handles[self._engine.submit(self._generation(context, dict(settings)))] = index
        while handles:
            for event in self._engine.step():
                texts[handles[event.handle]] += event.text
                if event.finish_reason is not None:
                    assert event.error is None, event.error
                    del handles[event.handle]
        return texts

    def _generation(self, context: str, settings: dict[str, Any]) -> Request:
        until: str | Sequence[str] = settings.get("until") or []
        most = int(settings.get("max_gen_toks") or self._max_new_tokens)
        ids = self._engine.tokenizer.encode(context)[-(self._backend.context - most) :]
        sampled = bool(settings.get("do_sample")) and float(settings.get("temperature") or 0) > 0
        return Request(
            prompt_ids=ids,
            sampling=SamplingParams(
                max_new_tokens=most,
                stop=(until,) if isinstance(until, str) else tuple(until),
                temperature=float(settings["temperature"]) if sampled else 0,
                top_p=float(settings.get("top_p") or 1) if sampled else 1,
            ),
            stop_ids=self._backend.stop_ids,
        )
