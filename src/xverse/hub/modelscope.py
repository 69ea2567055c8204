"""Models from ModelScope, by its own client: it resumes, and checks each file's sha256 as it lands."""

from __future__ import annotations

from pathlib import Path

from xverse.config import UserError, need
from xverse.hub.resolve import DOCUMENTS, NEEDED, similar
from xverse.log import notice

SMALL = [*NEEDED, *(f"{name}*" for name in DOCUMENTS)]
WEIGHTS = (["model*.safetensors", "model*.safetensors.index.json"], ["pytorch_model*.bin*"])


def fetch(model: str) -> Path:
    """Download ``org/name`` or find it in ModelScope's cache (MODELSCOPE_CACHE).

    Raises UserError without the ``modelscope`` package, for an unknown id, no network and a wrong checksum.
    """
    client = need("modelscope.hub.snapshot_download", "modelscope", f"{model} from ModelScope")
    snapshot_download = client.snapshot_download
    notice(f"{model}: from ModelScope")
    try:
        path = Path(snapshot_download(model, allow_file_pattern=SMALL))
        if not (path / "config.json").exists():
            raise UserError(f"{model}: the repository is no model directory: it has no config.json")
        for patterns in WEIGHTS:
            path = Path(snapshot_download(model, allow_file_pattern=[*SMALL, *patterns]))
            if any(path.glob(patterns[0])):
                return path
    except UserError:
        raise
    except Exception as error:  # its exception classes moved between releases
        raise UserError(_reason(model, error)) from error
    raise UserError(f"{model}: the repository has no weights in safetensors or .bin")


def _reason(model: str, error: Exception) -> str:
    names = {cls.__name__ for cls in type(error).__mro__}
    text = " ".join(str(error).split())[:200]
    if "FileIntegrityError" in names or "hash mismatch" in text.lower():
        return f"{model}: a downloaded file does not have ModelScope's checksum; try again ({text})"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "NotExistError" in names or status == 404:
        return f"ModelScope has no model '{model}'{similar(model)}"
    if names & {"ConnectionError", "Timeout", "NetworkError", "CacheNotFound"}:
        return f"{model}: ModelScope cannot be reached, and the model is not in its cache ({text})"
    return f"{model}: ModelScope did not deliver it ({text})"
