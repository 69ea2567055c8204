from ..formats.conftest import model, upstream  # noqa: TID252

__all__ = ["model", "upstream"]
