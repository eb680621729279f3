"""Runs every Triton kernel in Triton's interpreter (``tests/conftest.py`` asks for it), with its bf16 mended: GPUs round it."""

import ml_dtypes
import numpy as np
import pytest
import triton_emulation

interpreter = pytest.importorskip("triton.runtime.interpreter")
_dot, _cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl


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


def _cast_impl(self, source, to):
    """The interpreter cuts fp32 off to bf16: it is rounded to nearest, ties to even, as ``cvt.rn`` does."""
    tl = interpreter.tl
    if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _cast(self, source, to)
    return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)


interpreter.InterpreterBuilder.cast_impl = _cast_impl
triton_emulation.install(interpreter)


@pytest.fixture(autouse=True)
def _quiet():
    """GPUs overflow to Inf and divide by zero without a word; numpy warns, which is an error here."""
    with np.errstate(all="ignore"):
        yield
