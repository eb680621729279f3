"""Fused kernels compiled on the machine by numba, where numba is installed: the room works without.

Importing this package imports no numba; import ``jit.quantize`` and ``jit.gemv`` only where ``available()``
is ''.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


def is_installed() -> bool:
    """Whether numba is there to be imported."""
    return find_spec("numba") is not None


@cache
def available() -> str:
    """Why the compiled kernels cannot be used: '' where they can, else the reason. Imports numba on the first
    call.
    """
    if not is_installed():
        return "numba is not installed"
    try:
        import numba.core.config as config
        import numba.extending  # noqa: F401 - imported to see whether it can be
    except (
        Exception
    ) as error:  # numba refuses a numpy it does not know with ImportError, a broken llvmlite with OSError
        return f"numba cannot be imported: {error}"
    if getattr(config, "DISABLE_JIT", 0):
        return "NUMBA_DISABLE_JIT is set"
    from quantport_cpu.jit.target import host_target

    return host_target().missing
