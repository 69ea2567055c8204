"""Models and datasets from ModelScope, by its own client, which resumes and verifies each file's sha256."""

from __future__ import annotations

from pathlib import Path

from xverse.config import UserError, need
from xverse.hub.resolve import DOCUMENTS, NEEDED, similar
from xverse.log import notice

SMALL = [*NEEDED, *(f"{name}*" for name in DOCUMENTS)]
WEIGHTS = (["model*.safetensors", "model*.safetensors.index.json"], ["pytorch_model*.bin*"])


def fetch(model: str) -> Path:
    """Download the model ``org/name`` or find it in ModelScope's cache (MODELSCOPE_CACHE).

    Raises UserError if the ``modelscope`` package is missing, for an unknown id, no network and a wrong
    checksum.
    """
    client = need("modelscope.hub.snapshot_download", "modelscope", f"{model} from ModelScope")
    snapshot_download = client.snapshot_download
    notice(f"{model}: from ModelScope")
    try:
        path = Path(snapshot_download(model, allow_file_pattern=SMALL))
        if not (path / "config.json").exists():
            raise UserError(f"{model}: not a model repository: no config.json")
        for patterns in WEIGHTS:
            path = Path(snapshot_download(model, allow_file_pattern=[*SMALL, *patterns]))
            if any(path.glob(patterns[0])):
                return path
    except UserError:
        raise
    except Exception as error:  # its exception classes differ between releases
        raise UserError(_reason(model, error)) from error
    raise UserError(f"{model}: the repository has no weights in safetensors or .bin")


def _reason(name: str, error: Exception, kind: str = "model") -> str:
    classes = {cls.__name__ for cls in type(error).__mro__}
    text = " ".join(str(error).split())[:200]
    if "FileIntegrityError" in classes or "hash mismatch" in text.lower():
        return f"{name}: a downloaded file does not have ModelScope's checksum; try again ({text})"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "NotExistError" in classes or status == 404:
        return f"ModelScope has no {kind} '{name}'{similar(name)}"
    if classes & {"ConnectionError", "Timeout", "NetworkError", "CacheNotFound"}:
        return f"{name}: ModelScope cannot be reached, and its cache does not hold the {kind} ({text})"
    return f"{name}: ModelScope download failed ({text})"


def fetch_dataset(name: str) -> Path:
    """Download the dataset repository ``org/name`` or find it in ModelScope's cache.

    Raises UserError if the ``modelscope`` package is missing or its client fails.
    """
    client = need("modelscope", "modelscope", f"{name} from ModelScope")
    notice(f"{name}: from ModelScope")
    try:
        return Path(client.dataset_snapshot_download(name))
    except Exception as error:
        raise UserError(_reason(name, error, "dataset")) from error
