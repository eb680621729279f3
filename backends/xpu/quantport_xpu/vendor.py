"""Operators of packages other than torch: ``vllm-xpu-kernels`` and Intel's archived extension. Both are
optional.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch

PACKAGE = "vllm_xpu_kernels"
EXTENSION = "intel_extension_for_pytorch"
_KERNELS = "vllm-project/vllm-xpu-kernels"
_IPEX = "intel/intel-extension-for-pytorch"
# The schemas of the operators that this room calls, from the sources below. The extension infers them from
# C++, so that its arguments have no names.
SCHEMAS = {
    "_xpu_C.fp8_gemm": (
        "(Tensor A, Tensor B, ScalarType? out_dtype, Tensor? A_scale_, Tensor? B_scale_, Tensor? bias_) "
        "-> Tensor"
    ),
    "_xpu_C.fp8_gemm_w8a16": "(Tensor A, Tensor B, Tensor? B_scale_, Tensor? bias_) -> Tensor",
    "_xpu_C.fp4_gemm": (
        "(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType? out_dtype, Tensor? bias_) -> Tensor"
    ),
    "_xpu_C.int4_gemm_w4a16": (
        "(Tensor A, Tensor B, Tensor? bias, Tensor B_scale, Tensor B_zp, int group_size, Tensor? g_idx) "
        "-> Tensor"
    ),
    "_xpu_C.int4_gemm_w4a8": (
        "(Tensor A_, Tensor A_scale, Tensor A_zp, Tensor B, Tensor B_scale, Tensor B_zp, int group_size, "
        "Tensor? g_idx, Tensor? bias) -> Tensor"
    ),
    "_C.per_token_group_quant_mxfp4": (
        "(Tensor input, Tensor(a!) output_q, Tensor(b!) output_s, int group_size, float eps) -> ()"
    ),
    "torch_ipex.mm_mxfp4_out_marlin.xpu": "(Tensor _0, Tensor _1, Tensor _2, Tensor _3, int _4) -> ()",
}
SOURCES = {
    "_xpu_C": f"{_KERNELS} csrc/xpu/torch_bindings.cpp at 1d5b4f5e5ddd",
    "_C": f"{_KERNELS} csrc/torch_bindings.cpp at f1c4861b9eff",
    "torch_ipex": f"{_IPEX} csrc/gpu/aten/operators/XEGEMM_MXFP4_marlin.cpp at acaa1016cdba",
}


def missing(name: str, kernel: str) -> str:
    """Why a kernel cannot call an operator that is not here. ``name`` is a key of ``SCHEMAS``."""
    source = SOURCES[name.partition(".")[0]]
    package = source.partition(" ")[0].partition("/")[2]
    return (
        f"{kernel} needs {name.partition('.')[2]}{SCHEMAS[name]} of {package}, which was not found [{source}]"
    )


def load(
    installed: Callable[[str], Any] = find_spec, load_module: Callable[[str], Any] = import_module
) -> str:
    """Imports ``vllm-xpu-kernels`` where it is installed. Returns why that failed; '' where it did not."""
    try:
        if installed(PACKAGE) is not None:
            load_module(f"{PACKAGE}._C")
            load_module(f"{PACKAGE}._xpu_C")
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, another oneAPI
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def load_extension(
    version: Callable[[str], str] = metadata.version, load_module: Callable[[str], Any] = import_module
) -> None:
    """Imports Intel's extension where its build for XPU and for this torch is installed.

    Any other build would end the process, or change how the CPU computes.
    """
    try:
        installed = version(EXTENSION)
        if "+xpu" in installed and installed.split(".")[:2] == torch.__version__.split(".")[:2]:
            load_module(EXTENSION)
    # Not installed (PackageNotFoundError is an ImportError), or built for another oneAPI.
    except (ImportError, OSError, RuntimeError):
        return


def fits(schema: Any, expected: str) -> bool:
    """Whether an operator can be called as expected: it has the same arguments first, and defaults for all
    others.
    """
    parsed = torch._C.parse_schema(f"expected{expected}")
    wanted = [(a.name, str(a.type)) for a in parsed.arguments]
    first, rest = schema.arguments[: len(wanted)], schema.arguments[len(wanted) :]
    same = [(a.name, str(a.type)) for a in first] == wanted and all(a.has_default_value() for a in rest)
    return same and [str(r.type) for r in schema.returns] == [str(r.type) for r in parsed.returns]


def overload(ops: Any, name: str) -> Any:
    """The overload in ``ops`` (``torch.ops``) that a key of ``SCHEMAS`` names; None where it is not there."""
    namespace, operator, which = [*name.split("."), "default"][:3]
    return getattr(getattr(getattr(ops, namespace, None), operator, None), which, None)


def features(ops: Any) -> frozenset[str]:
    """The keys of ``SCHEMAS`` whose operators are in ``ops`` (``torch.ops``) with the expected schema."""
    overloads = {name: op for name in SCHEMAS if (op := overload(ops, name)) is not None}
    return frozenset(name for name, op in overloads.items() if fits(op._schema, SCHEMAS[name]))
