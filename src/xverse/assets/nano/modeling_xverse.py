"""Leads transformers to the code of this model, which is in the package xverse-lm."""

try:
    from xverse.hf import XverseForCausalLM  # noqa: F401
except ImportError as error:
    raise ImportError("this model needs the package xverse-lm: pip install xverse-lm") from error
