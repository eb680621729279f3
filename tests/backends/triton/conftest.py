"""Runs every Triton kernel in Triton's interpreter (``tests/conftest.py`` asks for it), mended where GPUs
compute otherwise.
"""

import numpy as np
import pytest
import triton_emulation

triton_emulation.install(pytest.importorskip("triton.runtime.interpreter"))


@pytest.fixture(autouse=True)
def _quiet():
    """GPUs overflow to Inf and divide by zero without a word; numpy warns, which is an error here."""
    with np.errstate(all="ignore"):
        yield
