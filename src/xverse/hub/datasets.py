"""Dataset repositories on Hugging Face and ModelScope, downloaded as models are."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from xverse.config import UserError


def fetch_dataset(hub_id: str | None, modelscope_id: str | None, patterns: Sequence[str]) -> Path:
    """Download the files of a dataset repository that match ``patterns``, or find them in the cache.

    Hugging Face comes first, ModelScope if it has no such id or fails. Raises UserError if neither works.
    """
    assert hub_id or modelscope_id
    if hub_id is not None:
        from xverse.hub import huggingface

        def choose(names: Sequence[str]) -> list[str]:
            return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]

        try:
            return huggingface.fetch(hub_id, choose, repo_type="dataset", cached=patterns)
        except UserError as error:
            if modelscope_id is None:
                raise
            failure = error
    from xverse.hub import modelscope

    assert modelscope_id is not None
    try:
        return modelscope.fetch_dataset(modelscope_id)
    except UserError as error:
        if hub_id is None:
            raise
        raise UserError(f"{failure}; {error}") from None
