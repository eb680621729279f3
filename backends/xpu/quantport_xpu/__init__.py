"""The XPU room: Intel GPUs."""

from quantport.backend import Backend, hookimpl
from quantport_xpu.detect import XpuBackend


@hookimpl
def quantport_backend() -> Backend:
    """Returns the backend of Intel GPUs."""
    return XpuBackend()
