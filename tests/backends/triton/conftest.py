"""Runs every Triton kernel in Triton's interpreter (``tests/conftest.py`` sets it), with its arithmetic made
that of GPUs.
"""

import numpy as np
import pytest
import triton_emulation

triton_emulation.install(pytest.importorskip("triton.runtime.interpreter"))


@pytest.fixture(autouse=True)
def _quiet():
    """GPUs overflow to Inf and divide by zero silently; numpy warns, which is an error here."""
    with np.errstate(all="ignore"):
        yield
