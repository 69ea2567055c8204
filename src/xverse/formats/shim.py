"""Two small files that let ``trust_remote_code=True`` find the model's code in the installed package.

They are text, not modules of this package: transformers copies them to its own cache and runs them there. It
first checks that their imports are installed, but ignores imports inside ``try``, so the message below is
shown.
"""

AUTO_MAP = {
    "AutoConfig": "configuration_xverse.XverseConfig",
    "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM",
}
CLASSIFIER_MAP = {
    "AutoConfig": AUTO_MAP["AutoConfig"],
    "AutoModelForSequenceClassification": "modeling_xverse.XverseForSequenceClassification",
}

_FILE = '''\
"""Leads transformers to the code of this model, which is in the package xverse-lm."""

try:
    from xverse.hf import {name}  # noqa: F401
except ImportError as error:
    raise ImportError("this model needs the package xverse-lm: pip install xverse-lm") from error
'''

SHIM_FILES = {
    "configuration_xverse.py": _FILE.format(name="XverseConfig"),
    "modeling_xverse.py": _FILE.format(name="XverseForCausalLM, XverseForSequenceClassification"),
}
