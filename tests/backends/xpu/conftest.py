"""Operators of Intel GPUs on the CPU, for the tests that ask for them."""

from __future__ import annotations

import pytest
import xpu_stand_in


@pytest.fixture
def xpu_operators_registered():
    """The operators that the CPU lacks, registered for it, with the vendors' schemas."""
    with xpu_stand_in.operators():
        yield
