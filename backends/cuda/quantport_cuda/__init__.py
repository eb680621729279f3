"""The CUDA room: NVIDIA GPUs."""

from quantport.backend import Backend, hookimpl
from quantport_cuda.detect import CudaBackend


@hookimpl
def quantport_backend() -> Backend:
    """Returns the backend of NVIDIA GPUs."""
    return CudaBackend()
