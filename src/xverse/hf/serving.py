"""Plug-ins of vLLM and SGLang, which find them by entry point in each of their processes.

Both compute XVERSE with their Llama classes: the weights have the same names and shapes. They read the
configuration and the tokenizer through transformers.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from xverse.hf.configuration import XverseConfig
from xverse.hf.tokenization import XverseTokenizer

_ARCHITECTURE = "XverseForCausalLM"
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(XverseConfig.__init__).parameters.items()
    if parameter.default not in (inspect.Parameter.empty, None)
}


class XverseLlamaConfig(LlamaConfig):
    """Llama's configuration with XVERSE's defaults, from a ``config.json`` of ``model_type: xverse``.

    Unlike ``XverseConfig`` it leaves ``quantization_config`` to the program that serves the model.
    """

    model_type = XverseConfig.model_type

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises UserError for what the model has not got, such as a kind of rope scaling."""
        given = {key: value for key, value in config_dict.items() if value is not None}
        plain = {key: value for key, value in given.items() if key != "quantization_config"}
        XverseConfig(**plain).to_model_config().without_experts("vLLM and SGLang")
        return super().from_dict({**_DEFAULTS, **given}, **kwargs)


def vllm() -> None:
    """Entry point of ``vllm.general_plugins``. vLLM had the class until 0.23."""
    from vllm import ModelRegistry

    _register()
    ModelRegistry.register_model(_ARCHITECTURE, "vllm.model_executor.models.llama:LlamaForCausalLM")


def sglang() -> None:
    """Entry point of ``sglang.srt.plugins``. SGLang has the model's class, and no configuration for it."""
    _register()


def _register() -> None:
    """Make transformers' Auto classes return what these programs need, in this process."""
    AutoConfig.register(XverseLlamaConfig.model_type, XverseLlamaConfig, exist_ok=True)
    AutoTokenizer.register(XverseLlamaConfig, tokenizer_class=XverseTokenizer, exist_ok=True)
