"""Sampling parameters, defined once.

The command line, the HTTP API, the web page, ``/params``, ``model.chat``, generation_config.json and the
engine derive names, ranges, defaults and help from the fields of ``SamplingParams``. This module does not
import torch, so that command line parsers may import it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xverse.config import UserError, build

MOST_STOPS = 16
MOST_BIASES = 1024


@dataclass(frozen=True, kw_only=True)
class Param:
    """What each surface needs to know about one parameter.

    ``kind``: float, int, str (a list of texts) or dict (token id to bias). The range is ``low`` to ``high``
    (None: unbounded), without ``low`` itself if ``above``. ``label`` and ``help`` are (English, Chinese).
    ``slider``: the page's (least, greatest, step). ``http`` is the API's name, ``stored`` the key in
    generation_config.json; both default to the field's name. ``api_only``: only the HTTP API has it.
    """

    kind: type
    label: tuple[str, str]
    help: tuple[str, str]
    low: float = 0
    high: float | None = None
    above: bool = False
    metavar: str = "N"
    slider: tuple[float, float, float] | None = None
    name: str = ""
    http: str = ""
    stored: str = ""
    api_only: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def text(self, language: str) -> tuple[str, str]:
        """Label and help in ``en`` or ``zh``."""
        index = ("en", "zh").index(language)
        return self.label[index], self.help[index]

    def check(self, name: str, value: Any) -> None:
        """Raises UserError unless ``value`` is a number of this kind within the range."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63
        high = math.inf if self.high is None else self.high
        if not number or not self.low <= value <= high or (self.above and value == self.low):
            span = f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"
            span = f"above {self.low}, at most {self.high}" if self.above else span
            raise UserError(f"{name}: {value!r} is out of range ({span})")
        if self.kind is int and not isinstance(value, int):
            raise UserError(f"{name}: {value!r} is not a whole number")


def _param(
    default: Any, label: tuple[str, str], help: tuple[str, str], kind: type | None = None, **more: Any
) -> Any:
    """A field; ``kind`` is that of its default unless given."""
    metadata = {"param": Param(kind=kind or type(default), label=label, help=help, **more)}
    if kind is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a reply ends. The defaults leave the model's distribution as it is.

    ``temperature`` 0 is greedy. ``repetition_penalty`` counts prompt and reply (CTRL, arXiv:1909.05858);
    ``presence_penalty`` and ``frequency_penalty`` count the reply alone, as OpenAI defines them; ``min_p`` is
    arXiv:2407.01082. ``logit_bias`` is added before anything else. With ``seed`` None replies differ from
    call to call. Raises UserError, naming the field, for a value out of range.
    """

    temperature: float = _param(
        1.0,
        ("Temperature", "温度"),
        ("divides the logits; 0 always takes the most probable token", "越低越稳定；0：总是取最可能的词元"),
        high=100,
        metavar="T",
        slider=(0, 2, 0.05),
    )
    top_k: int = _param(
        0,
        ("Top k", "Top k"),
        ("draw from the K most probable tokens only; 0: off", "只在最可能的 K 个词元中抽取；0：不限"),
        metavar="K",
        slider=(0, 200, 1),
    )
    top_p: float = _param(
        1.0,
        ("Top p", "Top p"),
        (
            "draw from the most probable tokens that together reach probability P; 1: off",
            "只在累计概率达到该值的最可能词元中抽取；1：不限",
        ),
        high=1,
        above=True,
        metavar="P",
        slider=(0.05, 1, 0.01),
    )
    min_p: float = _param(
        0.0,
        ("Min p", "Min p"),
        (
            "exclude tokens less probable than P times the most probable one; 0: off",
            "排除概率低于最高概率乘以该值的词元；0：不限",
        ),
        high=1,
        metavar="P",
        slider=(0, 1, 0.01),
    )
    repetition_penalty: float = _param(
        1.0,
        ("Repetition penalty", "重复惩罚"),
        (
            "makes tokens that the prompt or the reply contains less likely; 1: off",
            "降低提示和回复中已有词元的概率；1：关闭",
        ),
        low=0.01,
        high=100,
        metavar="R",
        slider=(1, 2, 0.01),
    )
    presence_penalty: float = _param(
        0.0,
        ("Presence penalty", "存在惩罚"),
        (
            "subtracted from the logits of tokens that the reply contains; 0: off",
            "从回复中已有词元的分数里减去该值；0：关闭",
        ),
        low=-2,
        high=2,
        metavar="R",
        slider=(-2, 2, 0.05),
    )
    frequency_penalty: float = _param(
        0.0,
        ("Frequency penalty", "频率惩罚"),
        (
            "subtracted from a token's logit for each time the reply contains it; 0: off",
            "词元在回复中每出现一次，就从其分数里减去该值；0：关闭",
        ),
        low=-2,
        high=2,
        metavar="R",
        slider=(-2, 2, 0.05),
    )
    seed: int | None = _param(
        None,
        ("Seed", "随机种子"),
        ("makes replies reproducible; random if not set", "设定后回复可以重现；留空则随机"),
        high=2**62,
        kind=int,
    )
    max_new_tokens: int = _param(
        2048,
        ("Maximum tokens", "最大词元数"),
        ("end the reply after N tokens", "回复的最大长度"),
        low=1,
        http="max_tokens",
        slider=(1, math.inf, 1),
    )
    stop: tuple[str, ...] = _param(
        (),
        ("Stop texts", "停止文本"),
        ("end the reply before TEXT; may be given several times", "回复在其中任一文本之前结束，每行一个"),
        metavar="TEXT",
        stored="stop_strings",
        kind=str,
    )
    logit_bias: Mapping[int, float] = _param(
        None,
        ("Logit bias", "词元偏置"),
        ("added to the logits of single tokens, by token id", "按词元编号加到其分数上的值"),
        low=-100,
        high=100,
        api_only=True,
        kind=dict,
    )

    def __post_init__(self) -> None:
        for name, param in PARAMS.items():
            value = getattr(self, name)
            if param.kind in (int, float) and (value is not None or name != "seed"):
                param.check(name, value)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError("stop: expected a list of non-empty texts")
        object.__setattr__(self, "stop", tuple(self.stop))
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise UserError(f"logit_bias: {token!r} is not a token id")
            PARAMS["logit_bias"].check(f"logit_bias of token {token}", bias)

    @classmethod
    def greedy(cls, max_new_tokens: int = 2048, **values: Any) -> SamplingParams:
        """Always the most probable token."""
        return cls(temperature=0.0, max_new_tokens=max_new_tokens, **values)

    def changed(self, values: Mapping[str, Any], where: str) -> SamplingParams:
        """A copy with a user's ``values``. Raises UserError for an unknown name or a wrong value."""
        for name in values:
            if name in PARAMS and PARAMS[name].api_only:
                raise UserError(f"{where}: {name} can be set in requests to the HTTP API only")
        texts = values.get("stop")
        if isinstance(texts, str):
            values = {**values, "stop": [texts]}
        checked = build(SamplingParams, values, where)
        return dataclasses.replace(self, **{name: getattr(checked, name) for name in values})


def _named(name: str, param: Param) -> Param:
    return dataclasses.replace(param, name=name, http=param.http or name, stored=param.stored or name)


PARAMS: dict[str, Param] = {
    field.name: _named(field.name, field.metadata["param"]) for field in dataclasses.fields(SamplingParams)
}
NEUTRAL = SamplingParams()
# XVERSE's published values for its chat models, and those of its demonstration of text generation.
CHAT = SamplingParams(temperature=0.5, top_k=30, top_p=0.85, repetition_penalty=1.1)
COMPLETION = SamplingParams(top_k=50, top_p=0.92, max_new_tokens=100)

# Keys of generation_config.json that do not concern sampling: bookkeeping, token ids, caches, outputs.
_BOOKKEEPING = {
    *("transformers_version", "_from_model_config", "do_sample"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
}
# Values with which a key that is not supported has no effect.
_NO_EFFECT = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1,
    "length_penalty": 1,
}


def from_generation_config(values: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The parameters in a generation_config.json, and ``defaults`` for those that it does not set.

    Raises UserError for a wrong value.
    """
    known = {param.stored: name for name, param in PARAMS.items() if not param.api_only}
    given = {known[key]: value for key, value in values.items() if key in known and value is not None}
    if values.get("do_sample") is False:
        given["temperature"] = 0.0
    where = "generation_config.json"
    try:
        return defaults.changed(given, where)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


def unsupported_keys(values: Mapping[str, Any]) -> list[str]:
    """The keys of a generation_config.json that would change replies and are not supported."""
    known = {param.stored for param in PARAMS.values() if not param.api_only} | _BOOKKEEPING
    if values.get("max_new_tokens") is not None:  # transformers then ignores it too
        known |= {"max_length"}
    return [
        key for key, value in values.items() if key not in known and value and _NO_EFFECT.get(key) != value
    ]
