"""Make ``AutoConfig``, ``AutoModelForCausalLM`` and ``AutoTokenizer`` know ``model_type: xverse``.

``install()`` runs at ``import xverse`` and costs nothing: where transformers is not imported yet, it leaves
a finder that registers right after somebody imports it. transformers prefers explicitly registered classes
to a directory's own code even under ``trust_remote_code=True``, so no ``.py`` that ``config.json`` names
runs. (A tokenizer class that ``tokenizer_config.json`` names is beyond our reach; XVERSE publishes none, and
it too runs only under ``trust_remote_code=True``.)
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


def install() -> None:
    """Register now if transformers is imported, else when it gets imported. May be called repeatedly."""
    if _LIBRARY in sys.modules:
        register()
    elif not any(getattr(finder, "is_xverse_hook", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


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
    from xverse.hf.tokenization import XverseTokenizer

    AutoConfig.register(XverseConfig.model_type, XverseConfig, exist_ok=True)
    AutoModelForCausalLM.register(XverseConfig, XverseForCausalLM, exist_ok=True)
    AutoTokenizer.register(XverseConfig, tokenizer_class=XverseTokenizer, exist_ok=True)
    # Upstream's tokenizer_config.json names PreTrainedTokenizerFast, and a name there wins over a registered
    # class, except for the model types in this table, whose published class is known not to load.
    tokenization_auto.TOKENIZER_MAPPING_NAMES[XverseConfig.model_type] = XverseTokenizer.__name__
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(XverseConfig.model_type)


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
