"""``model.chat``: the assistant's next turn of a conversation, complete or streamed."""

from __future__ import annotations

import copy
import dataclasses
import json
import queue
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from xverse.config import UserError, check_keys
from xverse.engine.sampling_params import CHAT, NEUTRAL, PARAMS, SamplingParams
from xverse.tokenizer import ChatPrompt, Tokenizer, encode_chat

# Used if neither the caller nor the model's directory sets any parameter.
DEFAULTS = {
    "do_sample": True,
    **{
        PARAMS[name].stored: value
        for name, value in dataclasses.asdict(CHAT).items()
        if value != getattr(NEUTRAL, name) or name == "max_new_tokens"
    },
}
_DECISIVE = (
    *("do_sample", "max_length", "num_beams", "typical_p", "penalty_alpha"),
    *(param.stored for param in PARAMS.values()),
)

# Arguments of ``generate`` besides its settings that a chat may give.
_PASSED = {
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "streamer"),
    *("assistant_model", "assistant_tokenizer", "negative_prompt_ids", "negative_prompt_attention_mask"),
}

_wrapped: WeakKeyDictionary[Any, tuple[int, Tokenizer]] = WeakKeyDictionary()


def chat(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    stream: bool,
    generation_config: GenerationConfig | None,
    options: Mapping[str, Any],
) -> str | Iterator[str]:
    """See ``XverseForCausalLM.chat``."""
    chat_tokenizer = wrap_tokenizer(tokenizer)
    settings = _settings(model, generation_config)
    passed = _divide(options, settings, stream)
    unknown_ids = range(chat_tokenizer.vocab_size, model.config.vocab_size)  # a padded vocabulary's
    settings.suppress_tokens = [*(settings.suppress_tokens or []), *unknown_ids] or None
    prompt = encode_chat(
        chat_tokenizer,
        messages,
        max_new_tokens=settings.max_new_tokens or CHAT.max_new_tokens,
        max_positions=model.config.to_model_config().context_length,
        truncation=model.config.max_tokenizer_truncation,
    )
    _notice(prompt)
    ids = torch.tensor([prompt.ids], device=model.device)  # [1, T]
    arguments = {
        **passed,
        "inputs": ids,
        "attention_mask": torch.ones_like(ids),
        "generation_config": settings,
        "logits_processor": LogitsProcessorList(
            [*(passed.get("logits_processor") or []), *_penalties(settings, ids.shape[1])]
        ),
    }
    if settings.stop_strings or settings.token_healing:
        if tokenizer is chat_tokenizer:
            raise UserError(
                "stop_strings and token_healing need a tokenizer from AutoTokenizer.from_pretrained"
            )
        arguments["tokenizer"] = tokenizer
    ends = settings.eos_token_id
    end_ids = frozenset(ends if isinstance(ends, list) else [ends])
    if stream:
        return _stream(model, chat_tokenizer, arguments, end_ids)
    reply = model.generate(**arguments)[0, ids.shape[1] :].tolist()
    return chat_tokenizer.decode(_before_end(reply, end_ids))


def wrap_tokenizer(tokenizer: Any) -> Tokenizer:
    """This package's tokenizer with the vocabulary of a transformers tokenizer, cached per object.

    It encodes conversations and decodes streams; transformers' tokenizer would turn the text of an end marker
    in a message into the marker. Raises UserError for a tokenizer without a ``tokenizers`` backend.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"chat needs a tokenizer from AutoTokenizer.from_pretrained, not {type(tokenizer).__name__}"
        )
    size, chat_tokenizer = _wrapped.get(tokenizer, (0, None))
    if chat_tokenizer is None or size != len(tokenizer):  # tokens may have been added
        chat_tokenizer = Tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()), "tokenizer")
        _wrapped[tokenizer] = (len(tokenizer), chat_tokenizer)
    return chat_tokenizer


def _settings(model: Any, config: GenerationConfig | None) -> GenerationConfig:
    settings = copy.deepcopy(model.generation_config if config is None else config)
    untouched = GenerationConfig()
    if config is None and all(
        getattr(settings, key, None) == getattr(untouched, key, None) for key in _DECISIVE
    ):
        settings.update(**DEFAULTS)
    if settings.max_new_tokens is None and settings.max_length == untouched.max_length:
        settings.max_new_tokens = CHAT.max_new_tokens
    settings.return_dict_in_generate = False
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(settings, key) is None:
            setattr(settings, key, getattr(model.config, key))
    return settings


def _divide(options: Mapping[str, Any], settings: GenerationConfig, stream: bool) -> dict[str, Any]:
    """Write the settings among ``options`` to ``settings``; return the other arguments of ``generate``.

    Raises UserError for names that neither knows, and for what contradicts one reply as text.
    """
    stored = [param.stored for param in PARAMS.values() if param.name not in ("seed", "logit_bias")]
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | set(stored)
    check_keys(options, sorted(known | _PASSED), "chat")
    for name in known & options.keys():
        setattr(settings, name, options[name])  # `update` skips names that this class does not define
    if "max_length" in options and "max_new_tokens" not in options:
        settings.max_new_tokens = None
    if (settings.num_return_sequences or 1) > 1 or options.get("return_dict_in_generate"):
        raise UserError(
            "chat returns one reply as text; num_return_sequences and return_dict_in_generate need generate"
        )
    passed = {name: value for name, value in options.items() if name in _PASSED}
    if stream and passed.get("streamer") is not None:
        raise UserError("chat: stream=True and streamer are mutually exclusive")
    return passed


def _penalties(settings: GenerationConfig, prompt_length: int) -> list[LogitsProcessor]:
    """OpenAI's presence and frequency penalties, which ``generate`` lacks."""
    presence = getattr(settings, "presence_penalty", None) or 0.0
    frequency = getattr(settings, "frequency_penalty", None) or 0.0
    return [_CountPenalties(presence, frequency, prompt_length)] if presence or frequency else []


def _notice(prompt: ChatPrompt) -> None:
    if prompt.dropped_rounds:
        warnings.warn(
            f"the conversation is longer than the context: the oldest {prompt.dropped_rounds} round(s) were "
            "left out",
            stacklevel=4,
        )
    if prompt.cut_tokens:
        warnings.warn(
            f"the last message is longer than the context: {prompt.cut_tokens} token(s) were cut",
            stacklevel=4,
        )


def _before_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in end_ids:
            return ids[:index]
    return ids


def _stream(
    model: Any, chat_tokenizer: Tokenizer, arguments: dict[str, Any], end_ids: frozenset[int]
) -> Iterator[str]:
    tokens: queue.Queue[list[int] | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def run() -> None:
        try:
            model.generate(**arguments, streamer=_QueueStreamer(tokens), stopping_criteria=criteria)
        except BaseException as error:  # raised again by the reader
            tokens.put(error)
        tokens.put(None)

    given = arguments.pop("stopping_criteria", None) or []
    criteria = StoppingCriteriaList([*given, _Stopped(stop)])
    thread = threading.Thread(target=run, name="xverse-chat", daemon=True)
    thread.start()
    decoder = chat_tokenizer.stream()
    try:
        while (item := tokens.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            kept = _before_end(item, end_ids)
            text = "".join(decoder.push(token) for token in kept)
            if text:
                yield text
            if len(kept) < len(item):
                break
        if rest := decoder.finish():
            yield rest
    finally:  # also if the reader closes or drops the iterator
        stop.set()
        thread.join()


class _CountPenalties(LogitsProcessor):
    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._sampling = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, T], [B, V] → [B, V]
        reply = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, reply, torch.ones_like(reply, dtype=scores.dtype))
        sampling = self._sampling
        return scores - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts


class _QueueStreamer(BaseStreamer):
    """Forwards the tokens that ``generate`` produces. The first call contains the prompt."""

    def __init__(self, tokens: queue.Queue[Any]) -> None:
        self._tokens = tokens
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self._tokens.put(value.flatten().tolist())
        self._prompt = False

    def end(self) -> None:
        """Nothing: the reader waits until ``generate`` has returned, so that it sees an error."""


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # [B] bool
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)
