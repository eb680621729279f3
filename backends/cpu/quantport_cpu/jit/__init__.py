"""Fused kernels, compiled on the machine by numba where it is installed. The room works without them.

Importing this package imports no numba. Import its modules only where ``why_unavailable()`` is ''.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


def is_installed() -> bool:
    """Whether numba is there to be imported."""
    return find_spec("numba") is not None


@cache
def why_unavailable() -> str:
    """Why the compiled kernels cannot be used, or '' where they can. The first call imports numba."""
    if not is_installed():
        return "numba is not installed"
    try:
        import numba.core.config as config
        import numba.extending  # noqa: F401 - imported to see whether it can be
    except (
        Exception
    ) as error:  # ImportError for a numpy that numba does not know, OSError for a broken llvmlite
        return f"numba cannot be imported: {error}"
    if getattr(config, "DISABLE_JIT", 0):
        return "NUMBA_DISABLE_JIT is set"
    from quantport_cpu.jit.target import host_target

    return host_target().missing
