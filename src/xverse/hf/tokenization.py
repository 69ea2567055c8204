"""The tokenizer class that ``AutoTokenizer`` uses for ``model_type: xverse``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from xverse.tokenizer import SPECIAL_TOKENS
from xverse.tokenizer.chat_template import CHAT_TEMPLATE
from xverse.tokenizer.repair import needs_repair, read_tokenizer_json, repair_json


class XverseTokenizer(PreTrainedTokenizerFast):
    """``PreTrainedTokenizerFast`` that repairs ``tokenizer.json`` in memory if necessary.

    Upstream's file does not load in current libraries. Special tokens and chat template, which upstream's
    directories lack, default to XVERSE's. The class is saved
    as PreTrainedTokenizerFast with the repaired file, which loads without xverse.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        file = kwargs.get("tokenizer_file")
        if kwargs.get("tokenizer_object") is None and file is not None:
            values = read_tokenizer_json(file)
            if needs_repair(values):
                kwargs["tokenizer_object"] = tokenizers.Tokenizer.from_str(json.dumps(repair_json(values)))
                kwargs.pop("tokenizer_file")
        for name, token in zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS[1:], strict=True):
            if kwargs.get(name) is None:
                kwargs[name] = token
        if kwargs.get("chat_template") is None:
            kwargs["chat_template"] = CHAT_TEMPLATE
        super().__init__(*args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to convert; the default would read the file here because this class has an __init__."""
        kwargs.pop("trust_remote_code", None)
        return kwargs

    @classmethod
    def _patch_mistral_regex(cls, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        # For vocabularies above 100,000 transformers queries the hub whether the model is a Mistral.
        return tokenizer

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        files = super().save_pretrained(save_directory, *args, **kwargs)
        for name in files:
            path = Path(name)
            if path.name.endswith("tokenizer_config.json"):
                config = json.loads(path.read_text(encoding="utf-8"))
                config["tokenizer_class"] = "PreTrainedTokenizerFast"
                config.pop("auto_map", None)  # of a directory's code, which is not used
                path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return files
