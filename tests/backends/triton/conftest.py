"""Runs every Triton kernel in Triton's interpreter, on CPU tensors. Must be read before anything imports triton."""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("something imported triton before this file could ask for its interpreter: run these tests first, or alone")
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import triton_emulation

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


interpreter.InterpreterBuilder.create_dot = _create_dot
triton_emulation.install(interpreter)
