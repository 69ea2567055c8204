"""XVERSE's configuration class for transformers, with the keys of upstream's ``config.json``."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from xverse.files import write_json
from xverse.formats.compressed import METHOD, TABLE_METHOD
from xverse.formats.shim import AUTO_MAP, CLASSIFIER_MAP, SHIM_FILES
from xverse.model.config import XverseConfig as ModelConfig
from xverse.model.families import check_rope_base
from xverse.model.scaling import RopeScaling

QUANT_METHOD = TABLE_METHOD  # under which transformers finds this package's quantizer


class StoredQuantization(QuantizationConfigMixin):
    """A ``quantization_config`` for this package's quantizer, written back exactly as it was read.

    transformers selects the quantizer by ``quant_method``, which in the file may name another
    program's format.
    """

    def __init__(self, **stored: Any) -> None:
        self.stored = stored
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enumeration of theirs

    def get(self, key: str, default: Any = None) -> Any:
        """Dictionary access, which transformers uses while it looks for a quantizer."""
        return QUANT_METHOD if key == "quant_method" else default

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored)


class XverseConfig(PretrainedConfig):
    """Configuration of ``XverseForCausalLM``; the defaults are XVERSE-7B's.

    ``rope_theta`` remains a separate key, as in upstream's files; ``rope_parameters`` is read, too. Raises
    UserError for an unknown kind of rope scaling. Other features that the model lacks (grouped-query
    attention, biases) are refused when a model is built.
    """

    model_type = "xverse"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers reads a plain list)

    def __init__(
        self,
        vocab_size: int = 100534,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        hidden_act: str = "silu",
        max_position_embeddings: int = 8192,
        max_tokenizer_truncation: int = 6144,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 2,
        eos_token_id: int | list[int] | None = 3,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        rope = kwargs.pop("rope_parameters", None) or kwargs.pop("rope_scaling", None) or {}
        scaling = RopeScaling.from_json(rope, max_position_embeddings, "config.json")
        if scaling is not None:
            self.rope_parameters = scaling.to_json()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.max_tokenizer_truncation = max_tokenizer_truncation
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        if rope_theta is None and not rope.get("rope_theta"):
            known = {"hidden_size": hidden_size, "max_position_embeddings": max_position_embeddings}
            check_rope_base(known, str(kwargs.get("name_or_path") or "config.json"))
        self.rope_theta = rope.get("rope_theta", ModelConfig.rope_theta if rope_theta is None else rope_theta)
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        # These keys name code in the directory for transformers to run; `save_pretrained` writes ours.
        for key in ("auto_map", "custom_pipelines"):
            kwargs.pop(key, None)
        stored = kwargs.get("quantization_config")
        if isinstance(stored, dict) and stored.get("quant_method") in (METHOD, TABLE_METHOD, "gptq"):
            kwargs["quantization_config"] = StoredQuantization(**stored)
        super().__init__(**kwargs)

    def to_model_config(self) -> ModelConfig:
        """The configuration for ``xverse.model``. Raises UserError for features that the model lacks."""
        values = self.to_dict()
        if isinstance(self.eos_token_id, list):  # generation uses the whole list
            values["eos_token_id"] = self.eos_token_id[0]
        return ModelConfig.from_json(values, self.name_or_path or "config")

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> XverseConfig:
        """From the configuration of ``xverse.model``; ``kwargs`` as in the constructor."""
        values = config.to_json()
        for key in ("model_type", "torch_dtype"):
            values.pop(key)
        return cls(**{**values, **kwargs})

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Also writes the shim, so that the directory loads if xverse is installed but not imported."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, text in SHIM_FILES.items():
            (Path(save_directory) / name).write_text(text, encoding="utf-8")
        classifies = any("Classification" in name for name in self.architectures or ())
        self.auto_map = dict(CLASSIFIER_MAP if classifies else AUTO_MAP)
        try:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.auto_map

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers calls this after loading the shim, and would then copy this file."""


class FamilyConfig(XverseConfig):
    """The configuration of one of XVERSE's relatives (``model/families.py``) for the same classes, built by
    ``from_model_config``. It is saved as its publisher's class reads it, without the shim."""

    def __init__(self, shape: ModelConfig | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if shape is not None:
            self._shape = shape
            # What caches and attention functions of transformers read.
            self.num_key_value_heads, self.head_dim = shape.num_key_value_heads, shape.head_dim

    def to_model_config(self) -> ModelConfig:
        return self._shape

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> FamilyConfig:
        values = config.to_json()
        names = set(inspect.signature(XverseConfig.__init__).parameters) - {"self", "kwargs"}
        chosen = {name: value for name, value in values.items() if name in names}
        return cls(config, **chosen, max_tokenizer_truncation=config.context_length, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> FamilyConfig:
        """From a directory in its publisher's layout, which peft reads beside an adapter."""
        values, _ = cls.get_config_dict(pretrained_model_name_or_path)
        return cls.from_model_config(ModelConfig.from_json(values, str(pretrained_model_name_or_path)))

    def to_dict(self) -> dict[str, Any]:
        """The publisher's keys, with the type of the weights."""
        dtype = str(getattr(self, "dtype", None) or "float32").removeprefix("torch.")
        if not hasattr(self, "_shape"):
            return super().to_dict()
        values = self._shape.to_json(dtype)
        if any("Classification" in name for name in self.architectures or ()):
            names = [
                name.replace("ForCausalLM", "ForSequenceClassification") for name in values["architectures"]
            ]
            labels = {str(index): f"LABEL_{index}" for index in range(self.num_labels or 0)}
            values |= {"architectures": names, "id2label": labels, "pad_token_id": self.pad_token_id}
            values["label2id"] = {name: int(index) for index, name in labels.items()}
        return values

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(save_directory) / "config.json", self.to_dict())
