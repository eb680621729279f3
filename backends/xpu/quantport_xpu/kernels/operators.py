"""The ATen operators that torch has on Intel GPUs."""

from __future__ import annotations

import torch

from quantport.backend import Reason, Request

_YAML = "PyTorch native_functions.yaml"


def registered(operator: str) -> bool:
    """Whether torch's dispatcher has a kernel of ``aten::operator`` for XPU."""
    known = hasattr(torch.ops.aten, operator)
    return known and bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "XPU"))


def operator_reason(request: Request, kernel: str, operator: str, since: str) -> tuple[Reason, ...]:
    """The reason against a kernel whose operator torch lacks on XPU; empty where torch has it.

    For a real GPU torch's dispatcher decides, for a simulated one the version of torch.

    Args:
        request: The request.
        kernel: Name of the kernel.
        operator: Name of the operator.
        since: The first version of torch that has it on XPU.
    """
    needs = f"{kernel} needs torch {since} or later on XPU"
    if not request.device.simulated:
        lacks = f"{needs}: torch {torch.__version__} has no aten::{operator} there [{_YAML}]"
        return () if registered(operator) else (Reason(lacks),)
    if torch.__version__ >= since:  # TorchVersion compares as a version, not as text
        return ()
    return (Reason(f"{needs}, not {torch.__version__} [{_YAML}]"),)
