"""torch_npu's operators: their constants, and whether the installed build has them as they are called here.

Builds of one version differ (2.7.1 has no MX operator, 2.7.1.post11 has all), so the schemas decide and not
the version.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from quantport_npu.capabilities import arch_of

FRACTAL_ND, FRACTAL_NZ = 2, 29  # storage formats of CANN
# Formats of bytes: 256 + aclDataType (Ascend/pytorch torch_npu/csrc/custom_dtype/Init.h).
E8M0, E2M1 = 293, 296
LIMIT = 65535  # the largest last dimension of an operand, and K and N of weight-only products

PLUGIN = "Ascend/op-plugin at 517f2e7d, docs/zh/custom_APIs/torch_npu"
NN = "hicann/ops-nn at e5c3fa932"
WHEEL = "torch_npu 2.13.0"  # the wheel that the simulated driver runs
SIMULATED = ("ascend310p", "ascend910b", "ascend910c", "ascend950")
TEST = "tests/backends/npu/simulated"


@cache
def lacking(operator: str, arguments: tuple[str, ...] = ()) -> str:
    """Why the loaded torch_npu cannot call an operator with these arguments; empty if it can."""
    packet = getattr(torch.ops.npu, operator, None)
    if packet is None:
        return f"this torch_npu has no {operator}"
    missing = set(arguments) - {argument.name for argument in packet.default._schema.arguments}
    return f"{operator} of this torch_npu does not take {', '.join(sorted(missing))}" if missing else ""


def to_fractal_nz(weight: Tensor, **dtypes: Any) -> Tensor:
    """A matrix in FRACTAL_NZ, the tiles of the cube unit.

    Before CANN 9.1, torch_npu returns another format on A2 and A3 unless internal formats are allowed, which
    is off by default (Ascend/op-plugin at 517f2e7d, op_plugin/ops/aclops/FormatCastKernelNpu.cpp). As in
    vllm-ascend, the option is switched on and stays on.
    """
    _allow_internal_formats()
    out: Tensor = torch.ops.npu.npu_format_cast(weight, FRACTAL_NZ, **dtypes)
    return out


@cache
def _allow_internal_formats() -> None:
    if "torch_npu" in sys.modules:  # not where its operators are stand-ins
        torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]  # torch_npu adds it


@cache
def family() -> str:
    """The family of this machine's NPUs, as in ``capabilities.ARCHS``; a process has one kind of SoC."""
    return arch_of(import_module("torch_npu")._C._npu_get_soc_version(), "").family
