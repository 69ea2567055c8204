"""XVERSE-7B as open software."""

__version__ = "0.1.0"

from xverse.registration import install as _install

_install()
