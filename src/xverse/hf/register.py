"""Make ``AutoConfig``, ``AutoModelForCausalLM`` and ``AutoTokenizer`` know ``model_type: xverse``.

``install()`` runs at ``import xverse`` and costs nothing: where transformers is not imported yet, it leaves
a finder that registers right after somebody imports it. transformers prefers explicitly registered classes
to a directory's own code even under ``trust_remote_code=True``, so no ``.py`` that ``config.json`` names
runs. For code that ``tokenizer_config.json`` names there is no such preference: see ``_drop_tokenizer_code``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_LIBRARY = "transformers"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def install() -> None:
    """Register now if transformers is imported, else when it gets imported. May be called repeatedly."""
    if _LIBRARY in sys.modules:
        # In the middle of its import our own would fail; the first use of `xverse.hf` comes here again.
        if not _importing():
            register()
    elif not any(getattr(finder, "is_xverse_hook", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _importing() -> bool:
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == _LIBRARY]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in modules)


def register() -> None:
    """Enter our classes in transformers' tables. A transformers that we do not fit costs a warning only."""
    try:
        _register()
    except Exception as error:  # we run inside somebody else's `import transformers`, which must not fail
        warnings.warn(f"xverse: not registered with transformers: {error!r}", stacklevel=2)


def _register() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto import tokenization_auto

    from xverse.hf.configuration import XverseConfig
    from xverse.hf.modeling import XverseForCausalLM
    from xverse.hf.quantization import register_quantizer
    from xverse.hf.tokenization import XverseTokenizer

    register_quantizer()
    AutoConfig.register(XverseConfig.model_type, XverseConfig, exist_ok=True)
    AutoModelForCausalLM.register(XverseConfig, XverseForCausalLM, exist_ok=True)
    AutoTokenizer.register(XverseConfig, tokenizer_class=XverseTokenizer, exist_ok=True)
    # Upstream's tokenizer_config.json names PreTrainedTokenizerFast, and a name there wins over a registered
    # class, except for the model types in this table, whose published class is known not to load.
    tokenization_auto.TOKENIZER_MAPPING_NAMES[XverseConfig.model_type] = XverseTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(XverseConfig.model_type)
    _drop_tokenizer_code(tokenization_auto, XverseConfig.model_type)


def _drop_tokenizer_code(tokenization_auto: Any, model_type: str) -> None:
    """Wrap ``get_tokenizer_config`` so that an XVERSE directory names no tokenizer code.

    The one patch here: with such code named, ``AutoTokenizer`` passes over the registered class and, under
    ``trust_remote_code=True``, runs it. XVERSE publishes none. Other models' configurations pass untouched.
    """
    from transformers import PretrainedConfig

    read = tokenization_auto.get_tokenizer_config
    if getattr(read, "is_xverse_wrapper", False):
        return

    def get_tokenizer_config(name: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        values = read(name, *args, **kwargs)
        if "auto_map" in values:
            hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
            if PretrainedConfig.get_config_dict(name, **hub)[0].get("model_type") == model_type:
                values.pop("auto_map")
        return values

    get_tokenizer_config.is_xverse_wrapper = True  # type: ignore[attr-defined]  # a mark for the next reload
    tokenization_auto.get_tokenizer_config = get_tokenizer_config


class _AfterImport:
    """A finder that finds nothing itself: it lets transformers load as ever, then registers, once."""

    is_xverse_hook = True

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LIBRARY:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._wrap(spec.loader)
                return spec
        return None

    def _wrap(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # Not in find_spec, which also runs for those who only ask whether transformers is there.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        loader.exec_module = exec_module
