"""The NPU room: Ascend NPUs."""

from quantport.backend import Backend, hookimpl
from quantport_npu.detect import NpuBackend


@hookimpl
def quantport_backend() -> Backend:
    """Returns the backend of Ascend NPUs."""
    return NpuBackend()
