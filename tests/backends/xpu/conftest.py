"""Operators of Intel GPUs on the CPU, for the tests that need them."""

from __future__ import annotations

import pytest
import xpu_stand_in


@pytest.fixture
def xpu_operators_registered():
    """The operators that the CPU lacks, registered for it, with the vendors' schemas."""
    with xpu_stand_in.operators():
        yield


QUICK = ("int8", "fp8_per_channel", "fp8_per_block", "int4_weight_only", "mxfp4")


def pytest_collection_modifyitems(items):
    """Triton's interpreter quantizes models slowly: some schemes are loaded and saved, and all in the nightly
    run.
    """
    for item in items:
        here = getattr(item, "originalname", "") == "test_checkpoint" and item.path.parent.name == "xpu"
        if here and item.callspec.params["scheme"].name not in QUICK:
            item.add_marker(pytest.mark.slow)
