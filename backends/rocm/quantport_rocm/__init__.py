"""The ROCm room: AMD GPUs."""

from quantport.backend import Backend, hookimpl
from quantport_rocm.detect import RocmBackend


@hookimpl
def quantport_backend() -> Backend:
    """Returns the backend of AMD GPUs."""
    return RocmBackend()
