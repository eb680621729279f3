"""What stands for accelerators in the tests of their rooms."""

from __future__ import annotations

from pathlib import Path

import pytest
from exact_int_mm import exact_int_mm

HOST = Path(__file__).parent / "cpu"


@pytest.fixture(autouse=True, scope="module")
def _exact_products(request):
    """The host's own room is tested with the host's own operators."""
    if HOST in request.path.parents:
        yield
        return
    with exact_int_mm():
        yield
