"""Runs every Triton kernel in Triton's interpreter, on CPU tensors. Must be read before anything imports triton."""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("something imported triton before this file could ask for its interpreter: run these tests first, or alone")
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

interpreter = pytest.importorskip("triton.runtime.interpreter")
_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot(self, a, b, d, *args):
    """The interpreter keeps bf16 as its bits, and multiplies those: the operands are made fp32, which is exact."""
    return _dot(self, *map(_wide, (a, b)), d, *args)


def _wide(operand):
    tl = interpreter.tl
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _create_fma(self, x, y, z):
    """The interpreter rounds the product. In fp64 it is exact; the sum is rounded to odd there, so that fp32 can round it once."""
    product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    away = np.where((lost > 0) == (total > 0), 1, -1)
    odd = np.where((lost != 0) & np.isfinite(total) & (bits & 1 == 0), bits + away, bits)
    return interpreter.TensorHandle(odd.view(np.float64).astype(np.float32), z.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.create_fma = _create_fma


@pytest.fixture(autouse=True)
def _quiet():
    """Arithmetic with Inf and NaN is meant: a GPU does not warn of it."""
    with np.errstate(all="ignore"):
        yield
