"""The engine as a model of EleutherAI's lm-evaluation-harness, for tasks that this project does not have.

``import xverse.eval.harness`` registers it as the model ``xverse``. Names, defaults and results are those of
the library's own model ``hf``: text becomes the same ids, scores agree in float32, and generation settings
that a task does not give come from the model's generation_config.json.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from xverse.config import UserError, nearest, report_unknown
from xverse.engine import Request, SamplingParams
from xverse.engine.load import load_engine
from xverse.engine.sampling_params import NEUTRAL, PARAMS, unsupported_keys
from xverse.formats import ModelDirectory
from xverse.tokenizer.chat_template import CHAT_TEMPLATE

_log = logging.getLogger("lm_eval")
_DEFAULTS = dataclasses.replace(NEUTRAL, top_k=50)  # transformers' for sampling
_AUTO_BATCH = 32
Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, their ids

# Arguments of the library's model `hf` that this one takes with some values only.
_ONLY: dict[str, tuple[Any, ...]] = {
    "backend": ("default", "causal"),
    "revision": ("main", None),
    "subfolder": ("", None),
    "delta": (None,),
    "gguf_file": (None,),
    "tp_plan": (None,),
    "parallelize": (False, None),
    "mixed_precision_dtype": (None,),
    "softmax_dtype": ("float32", torch.float32, None),
    "enable_thinking": (False, None),
}
# And those that cannot change a result here: no code of a directory runs, quantised weights are recognised,
# prompts are always truncated on the left, and the engine keeps its own caches.
_NO_EFFECT = {
    *("trust_remote_code", "use_fast_tokenizer", "truncation", "logits_cache", "autogptq", "gptqmodel"),
    *("max_memory_per_gpu", "max_cpu_memory", "offload_folder"),
}


@register_model("xverse")
class Harness(TemplateLM):
    """Arguments are those of the library's ``hf``: ``pretrained`` (``nano``, a directory or a hub id),
    ``tokenizer``, ``max_length``, ``device``, ``dtype``, ``batch_size``, ``max_batch_size``,
    ``add_bos_token``, ``prefix_token_id``, ``peft``, ``think_end_token``, ``chat_template_args``,
    and ``max_gen_toks`` (256), ``quantize`` (``int8``, ``int4``), ``threads``.

    Raises UserError for a model that cannot be loaded, unknown arguments and values without support.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        tokenizer: str | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = "auto",
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        peft: str | None = None,
        think_end_token: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        max_gen_toks: int = 256,
        quantize: str | None = None,
        threads: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _check_others(others)
        if not isinstance(pretrained, (str, Path)):
            raise UserError("pretrained: name the model (nano, a directory or a hub id)")
        if think_end_token is not None and not isinstance(think_end_token, str):
            raise UserError(f"think_end_token: {think_end_token!r} is not a text")
        self._directory = ModelDirectory.named(str(pretrained))
        loaded = load_engine(
            self._directory,
            defaults=_DEFAULTS,
            threads=None if threads is None else int(threads),
            quantize=quantize,
            tokenizer=tokenizer,
            adapter=peft,
            device=device or "auto",
            max_batch=_batch(batch_size, max_batch_size),
        )
        self._engine, self._sampling, self._stop_ids = loaded.engine, loaded.sampling, loaded.stop_ids
        self._name = str(pretrained)
        self._tokenizer_directory = ModelDirectory.named(tokenizer or str(pretrained)).path
        self._check_dtype(dtype)
        context = self._engine.model.config.context_length
        self.max_length = context if max_length is None else int(max_length)
        if not 2 <= self.max_length <= context:
            raise UserError(f"max_length: {max_length} is out of range (2 to {context}, the model's context)")
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self._prefix = self._engine.tokenizer.bos_id if prefix_token_id is None else int(prefix_token_id)
        if not 0 <= self._prefix < self._engine.tokenizer.vocab_size:
            raise UserError(f"prefix_token_id: {self._prefix} is outside the vocabulary")
        self._think_end = think_end_token
        self._template_arguments = chat_template_args or {}

    @property
    def eot_token_id(self) -> int:
        return self._engine.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Special tokens in the text become their ids, which templates rely on. XVERSE puts none before a
        text; ``add_bos_token`` puts one there, unless the text begins with it."""
        tokenizer = self._engine.tokenizer
        ids = tokenizer.encode(string, allow_special=True)
        wanted = self.add_bos_token and add_special_tokens is not False
        if wanted and not has_bos_prefix(string, tokenizer.decode([tokenizer.bos_id], skip_special=False)):
            return [tokenizer.bos_id, *ids]
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.args) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _pair(self, context: str, continuation: str) -> Pair:
        """As ``hf`` divides them, except that a continuation whose tokens all merge into the context (Chinese
        words do) is encoded alone, where ``hf`` ends the run."""
        if context:
            context_ids, ids = self._encode_pair(context, continuation)
        else:
            context_ids, ids = [self._prefix], self.tok_encode(continuation, add_special_tokens=False)
            if ids[:1] == context_ids:
                ids = ids[1:]
        ids = ids or self.tok_encode(continuation, add_special_tokens=False)
        return (context, continuation), context_ids or [self._prefix], ids

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # what an empty continuation has
        scored = [index for index, (_, _, ids) in enumerate(requests) if ids]
        items, cut = [], 0
        for index in scored:
            _, context, ids = requests[index]
            if len(ids) > self.max_length:
                raise UserError(
                    f"item {index}: the continuation has {len(ids)} tokens, more than max_length "
                    f"({self.max_length})"
                )
            most = self.max_length + 1 - len(ids)  # the last token is not fed to the model
            if len(context) > most:
                cut += 1
                _log.warning(
                    "Combined length of context (%d) and continuation (%d) exceeds model's maximum length "
                    "(%d). Truncating %d tokens from the left.",
                    *(len(context), len(ids), self.max_length, len(context) - most),
                )
            items.append((context[-most:], [ids]))
        if cut:
            _log.warning("%d of %d contexts were truncated from the left.", cut, len(requests))
        for index, (scores,) in zip(scored, self._engine.score_likeliest(items), strict=True):
            results[index] = scores
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in the library's disjoint windows."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [utils.make_disjoint_window(window) for window in rolling]
            windows += [(None, context, ids) for context, ids in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = ["" for _ in requests]
        handles, until, cut = {}, [], 0
        for index, request in enumerate(requests):
            context, settings = request.args
            made, stops, lost = self._generation(context, settings)
            cut += lost > 0
            until.append(stops)
            handles[self._engine.submit(made)] = index
        if cut:
            _log.warning("%d of %d prompts were truncated from the left.", cut, len(requests))
        while handles:
            for event in self._engine.step():
                index = handles[event.handle]
                texts[index] += event.text
                if event.error:
                    raise UserError(f"request {index}: {event.error}")
                if event.finish_reason is not None:
                    del handles[event.handle]
        for index, request in enumerate(requests):
            texts[index] = postprocess_generated_text(texts[index], until[index], self._think_end)
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return texts

    def _generation(self, context: str, settings: dict[str, Any]) -> tuple[Request, list[str], int]:
        """The engine's request, the stop texts, and how many tokens of the context were cut."""
        values = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until = [text for text in values.pop("until") or [] if text]
        most = values.pop("max_gen_toks")
        ids = self.tok_encode(context) or [self._prefix]
        if "max_length" in values:
            _log.warning("`max_length` in generation kwargs. Please use `max_gen_toks` instead.")
            most = int(values.pop("max_length")) - len(ids)
        if most >= self.max_length:
            raise UserError(
                f"Invalid configuration: requested max tokens to generate ({most}) must be less than model's "
                f"maximum sequence length ({self.max_length})."
            )
        lost = max(0, len(ids) + most - self.max_length)
        if lost:
            _log.warning(
                "Left truncation applied. Original sequence length was %d, truncating to last %d tokens. "
                "Some content will be lost.",
                *(len(ids), len(ids) - lost),
            )
        ends = values.pop("eos_token_id", None)
        stop_ids = self._stop_ids if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
        # A text that is reasoned first may contain stop texts before its end.
        stop = () if self._think_end else tuple(until)
        sampling = self._sampling_of(values, most, stop)
        return Request(prompt_ids=ids[lost:], sampling=sampling, stop_ids=stop_ids), until, lost

    def _sampling_of(self, values: dict[str, Any], most: int, stop: tuple[str, ...]) -> SamplingParams:
        known = {param.stored: name for name, param in PARAMS.items() if not param.api_only}
        given = {known[key]: values[key] for key in values if key in known and values[key] is not None}
        rest = {key: value for key, value in values.items() if key not in known}
        if refused := unsupported_keys(rest):
            names = [*known, "until", "max_gen_toks", "do_sample"]
            shown = ", ".join(f"{key}={rest[key]!r}{nearest(key, names)}" for key in refused)
            raise UserError(f"generation settings: not supported: {shown}")
        if not values["do_sample"]:
            given["temperature"] = 0.0
        elif not float(given.get("temperature", 0)) > 0:
            raise UserError("generation settings: do_sample needs a temperature above 0")
        else:  # the library seeds torch
            given.setdefault("seed", int(torch.randint(2**62, ())))
        given = {
            name: PARAMS[name].kind(value) if PARAMS[name].kind in (int, float) else value
            for name, value in given.items()
        }
        merged = self._sampling.changed(given, "generation settings")
        return dataclasses.replace(merged, max_new_tokens=most, stop=stop)

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, whose template the library reads."""
        from transformers import AutoTokenizer

        import xverse  # noqa: F401 - registers the class

        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_directory)
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        return tokenizer

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, in the directory's template or, without one, in XVERSE's."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_arguments,
            )

        try:
            return render(chat_history)
        except TemplateError:
            _log.warning("Failed to apply chat template. removing the system role in chat history.")
            return render([message for message in chat_history if message["role"] != "system"])

    def get_model_info(self) -> dict[str, Any]:
        model = self._engine.model
        return {
            "model_num_parameters": model.config.num_parameters(),
            "model_dtype": str(self._dtype),
            "model_revision": "main",
            "model_sha": "",
        }

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._engine.model.parameters()).dtype

    def _check_dtype(self, dtype: str | torch.dtype | None) -> None:
        name = str(dtype).removeprefix("torch.")
        used = str(self._dtype).removeprefix("torch.")
        if name not in ("auto", "None", used):
            raise UserError(f"dtype: the engine computes this model in {used}, not {name}; leave it at auto")


def _check_others(others: dict[str, Any]) -> None:
    for name, allowed in _ONLY.items():
        if name in others and others[name] not in allowed:
            shown = " or ".join(repr(value) for value in allowed)
            raise UserError(f"{name}: {others[name]!r} is not supported here (only {shown})")
    known = [*inspect.signature(Harness.__init__).parameters, *_ONLY, *_NO_EFFECT]
    hints = {"model": "; did you mean 'pretrained'?", "max_new_tokens": "; did you mean 'max_gen_toks'?"}
    unknown = others.keys() - _ONLY.keys() - _NO_EFFECT
    report_unknown([(key, hints.get(key) or nearest(key, known)) for key in sorted(unknown)], "model_args")


def _batch(size: int | str | None, most: int | None) -> int:
    """How many sequences the engine runs at a time."""
    if size is None or str(size).partition(":")[0] == "auto":
        return _AUTO_BATCH if most is None else min(_AUTO_BATCH, int(most))
    if not str(size).isdecimal() or not 1 <= int(size) <= 1024:
        raise UserError(f"batch_size: {size!r} is neither a number from 1 to 1024 nor auto")
    return int(size)
