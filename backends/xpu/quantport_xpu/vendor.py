"""Operators of ``vllm-xpu-kernels``, which registers them as ``torch.ops._xpu_C``: used where they are found, never needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

PACKAGE = "vllm_xpu_kernels"
SOURCE = "vllm-project/vllm-xpu-kernels csrc/xpu/torch_bindings.cpp at 00a477e3063f"
PREFIX = "_xpu_C."  # of the features of a device
SCHEMAS = {  # what this room calls, as SOURCE has it
    "fp8_gemm": "(Tensor A, Tensor B, ScalarType? out_dtype, Tensor? A_scale_, Tensor? B_scale_, Tensor? bias_) -> Tensor",
    "fp8_gemm_w8a16": "(Tensor A, Tensor B, Tensor? B_scale_, Tensor? bias_) -> Tensor",
    "int4_gemm_w4a16": ("(Tensor A, Tensor B, Tensor? bias, Tensor B_scale, Tensor B_zp, int group_size, Tensor? g_idx) -> Tensor"),
}


def load(installed: Callable[[str], Any] = find_spec, load_module: Callable[[str], Any] = import_module) -> str:
    """Imports the package where it is installed. Returns why it failed, or ''."""
    try:
        if installed(PACKAGE) is not None:
            load_module(f"{PACKAGE}._xpu_C")
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, another oneAPI
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def fits(schema: Any, expected: str) -> bool:
    """Whether an operator is called as expected: the same arguments first, and defaults for whatever follows."""
    known = torch._C.parse_schema(f"expected{expected}")
    wanted = [(a.name, str(a.type)) for a in known.arguments]
    first, rest = schema.arguments[: len(wanted)], schema.arguments[len(wanted) :]
    same = [(a.name, str(a.type)) for a in first] == wanted and all(a.has_default_value() for a in rest)
    return same and [str(r.type) for r in schema.returns] == [str(r.type) for r in known.returns]


def features(namespace: Any) -> frozenset[str]:
    """``_xpu_C.<name>`` for every operator of a namespace of ``torch.ops`` that is there and has the expected signature."""
    found = {name: getattr(namespace, name, None) for name in SCHEMAS}
    return frozenset(PREFIX + n for n, op in found.items() if op is not None and fits(op.default._schema, SCHEMAS[n]))
