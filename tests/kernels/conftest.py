"""A fixture for the kernels of every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xverse.kernels.native import NAMES, kernel_name, library


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set; gives its name."""
    compiled = library()
    if compiled is None:
        pytest.skip("the kernels were not compiled")
    if compiled.xv_select(request.param.encode()) is None:
        pytest.skip(f"this processor does not have {request.param}")
    yield request.param
    compiled.xv_select(kernel_name().encode())
