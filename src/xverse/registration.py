"""Make transformers' Auto classes (configuration, models, tokenizer) know ``model_type: xverse``.

``install()`` runs at ``import xverse`` and is cheap: if transformers is not imported yet, it installs an
import finder that registers the classes right after the import. transformers prefers registered classes to a
directory's code even with ``trust_remote_code=True``, so a ``.py`` file named in ``config.json`` never runs.
transformers has no such setting for code named in ``tokenizer_config.json``: see ``_drop_tokenizer_code``.
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
    """Register now if transformers is imported, else as soon as it is. May be called repeatedly."""
    if _LIBRARY in sys.modules:
        # During its import, registering would fail; the first use of `xverse.hf` calls this again.
        if not _importing():
            register()
    elif not any(getattr(finder, "is_xverse_hook", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _importing() -> bool:
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == _LIBRARY]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in modules)


def register() -> None:
    """Register the Auto classes with transformers. An incompatible transformers causes a warning only."""
    try:
        _register()
    except Exception as error:  # this runs during the user's `import transformers`, which must not fail
        warnings.warn(f"xverse: not registered with transformers: {error!r}", stacklevel=2)


def _register() -> None:
    import transformers as hf
    from transformers.models.auto import tokenization_auto

    from xverse.hf.classification import XverseForSequenceClassification
    from xverse.hf.configuration import XverseConfig
    from xverse.hf.modeling import XverseForCausalLM, XverseModel
    from xverse.hf.quantization import register_quantizer
    from xverse.hf.tokenization import XverseTokenizer

    register_quantizer()
    hf.AutoConfig.register(XverseConfig.model_type, XverseConfig, exist_ok=True)
    hf.AutoModel.register(XverseConfig, XverseModel, exist_ok=True)
    hf.AutoModelForCausalLM.register(XverseConfig, XverseForCausalLM, exist_ok=True)
    hf.AutoModelForSequenceClassification.register(
        XverseConfig, XverseForSequenceClassification, exist_ok=True
    )
    hf.AutoTokenizer.register(XverseConfig, tokenizer_class=XverseTokenizer, exist_ok=True)
    # Upstream's tokenizer_config.json names PreTrainedTokenizerFast, which takes precedence over a registered
    # class, except for model types in this table of published classes that do not load.
    tokenization_auto.TOKENIZER_MAPPING_NAMES[XverseConfig.model_type] = XverseTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(XverseConfig.model_type)
    _drop_tokenizer_code(tokenization_auto, XverseConfig.model_type)


def _drop_tokenizer_code(tokenization_auto: Any, model_type: str) -> None:
    """Wrap ``get_tokenizer_config`` so that it ignores tokenizer code named by an XVERSE directory.

    Otherwise ``AutoTokenizer`` prefers such code to the registered class, and runs it with
    ``trust_remote_code=True``. XVERSE publishes no tokenizer code. Other models are not affected.
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

    get_tokenizer_config.is_xverse_wrapper = True  # type: ignore[attr-defined]  # marks the wrapper for a reload
    tokenization_auto.get_tokenizer_config = get_tokenizer_config


class _AfterImport:
    """A finder that lets transformers load as usual and then registers this package's classes, once."""

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
            # Not in find_spec, which also runs when a program only checks for transformers.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        loader.exec_module = exec_module
