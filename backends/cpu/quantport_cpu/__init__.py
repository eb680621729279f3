"""The CPU room: the embedded default."""

from quantport.backend import Backend, hookimpl
from quantport_cpu.detect import CpuBackend


@hookimpl
def quantport_backend() -> Backend:
    """Returns the backend of host processors."""
    return CpuBackend()
