"""Decides which test modules run in this process: those that need a simulated NPU of some family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import pytest


def simulated(*families: str) -> None:
    """Skips the calling module where torch_npu is not installed, or the SoC is of another family."""
    if find_spec("torch_npu") is None:
        pytest.skip(
            "torch_npu is not installed: `make npu` runs this in an environment of its own",
            allow_module_level=True,
        )
    from simulator import register, start

    assert start.DRIVER
    if families and register.family() not in families:
        pytest.skip(f"for {', '.join(families)}; this is {register.family()}", allow_module_level=True)


@contextmanager
def running() -> Iterator[None]:
    """The simulated NPU is here inside: it is started once in a process and never stopped."""
    import_module("simulator.start")
    yield
