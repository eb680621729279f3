"""torch_npu's operators: the constants that they take, and whether the installed build has them as they are
called here.

Builds of one version differ (2.7.1 has no MX operator, 2.7.1.post11 has all): the schema is read, never the
version.
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
# 256 + aclDataType (Ascend/pytorch torch_npu/csrc/custom_dtype/Init.h): what bytes stand for
E8M0, E2M1 = (
    293,
    296,
)
LIMIT = 65535  # of the last dimensions of both operands, and of K and N of weight-only products

PLUGIN = "Ascend/op-plugin at 517f2e7d, docs/zh/custom_APIs/torch_npu"
NN = "hicann/ops-nn at e5c3fa932"
WHEEL = "torch_npu 2.13.0"  # the wheel that the simulated driver runs
SIMULATED = ("ascend310p", "ascend910b", "ascend910c", "ascend950")
TEST = "tests/backends/npu/simulated"


@cache
def lacking(operator: str, arguments: tuple[str, ...] = ()) -> str:
    """Why an operator cannot be called with these arguments in the torch_npu that is loaded; empty if
    it can.
    """
    found = getattr(torch.ops.npu, operator, None)
    if found is None:
        return f"this torch_npu has no {operator}"
    missing = set(arguments) - {argument.name for argument in found.default._schema.arguments}
    return f"{operator} of this torch_npu does not take {', '.join(sorted(missing))}" if missing else ""


def tiles(weight: Tensor, **dtypes: Any) -> Tensor:
    """A matrix in FRACTAL_NZ, the tiles of the cube unit.

    Before CANN 9.1, torch_npu gives a tensor of another format on A2 and A3 unless internal formats are
    allowed, which they are not by default (Ascend/op-plugin at 517f2e7d,
    op_plugin/ops/aclops/FormatCastKernelNpu.cpp). As in vllm-ascend, the option stays on.
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
    """Family of the NPUs of this machine, as in ``capabilities.ARCHS``; torch_npu runs one kind of SoC in a
    process.
    """
    return arch_of(import_module("torch_npu")._C._npu_get_soc_version(), "").family
