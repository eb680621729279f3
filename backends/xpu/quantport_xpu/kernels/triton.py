"""The Triton kernels, where Triton has a backend for Intel GPUs: the package ``triton-xpu`` instead of
``triton``.

It compiles only on a machine with such a GPU, so the only evidence is Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from quantport.backend import Reason, Request
from quantport_triton.kernels.base import TritonKernel
from quantport_triton.kernels.scaled import TritonInt4Int8, TritonInt8
from quantport_triton.kernels.weight_only import TritonWeightOnly

INSTALL = "pip install --force-reinstall triton-xpu --index-url https://download.pytorch.org/whl/xpu"


def backend_reason() -> str:
    """Why the installed Triton does not compile for Intel GPUs; '' where it does. Imports nothing."""
    spec = find_spec("triton")
    folders = [Path(path) for path in (spec.submodule_search_locations or ())] if spec else []
    if any((folder / "backends" / "intel").is_dir() for folder in folders):
        return ""
    problem = "has no backend for Intel GPUs" if folders else "is not installed"
    return f"the package triton {problem}: {INSTALL}"


class _XpuTriton(TritonKernel):
    """A Triton kernel, where Triton compiles for Intel GPUs."""

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """First, that Triton lacks the backend; not for a simulated GPU, whose Triton is unknown."""
        missing = "" if request.device.simulated else backend_reason()
        return [Reason(missing)] if missing else super().reasons_against(request)


class XpuTritonInt8(_XpuTriton, TritonInt8):
    """W8A8 in one launch, after the one that quantizes the activations."""


class XpuTritonInt4Int8(_XpuTriton, TritonInt4Int8):
    """W4A8: int4 codes become int8 in registers."""


class XpuTritonWeightOnly(_XpuTriton, TritonWeightOnly):
    """W4A16, W6A16 and W8A16: codes are decoded in registers, next to the matrix engine."""
