"""What Triton's interpreter lacks: ``tl.dot_scaled``, with ml_dtypes as the judge of every format, summed in fp64."""

import ml_dtypes
import numpy as np

FORMATS = {"E2M1": ml_dtypes.float4_e2m1fn, "E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}


def values(codes, scale, kind, packed_along_k=True):
    """An operand ``[rows, K]`` in fp64, from codes ``[rows, K]`` or ``[rows, K / 2]`` and scales ``[rows, K / (16 or 32)]``."""
    assert packed_along_k
    codes = codes.view(np.uint8)
    if kind.name == "E2M1":  # two codes to a byte, the first one low
        codes = np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)
    value = codes.view(FORMATS[kind.name]).astype(np.float64)
    if scale is None:
        return value
    group = value.shape[1] // scale.data.shape[1]
    assert group in (16, 32)
    stored = ml_dtypes.float8_e4m3fn if group == 16 else ml_dtypes.float8_e8m0fnu
    return value * np.repeat(scale.data.view(stored).astype(np.float64), group, 1)


def install(interpreter):
    """Gives the interpreter ``create_dot_scaled`` where it has none, and lets formats be strings there, as compiled code does."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "create_dot_scaled"):
        return
    semantic = type(interpreter.interpreter_semantic)
    checked = semantic.dot_scaled

    def dot_scaled(self, left, left_scale, left_format, right, right_scale, right_format, *rest):
        formats = (interpreter.tl.constexpr(name) for name in (left_format, right_format))
        return checked(self, left, left_scale, next(formats), right, right_scale, next(formats), *rest)

    def create_dot_scaled(
        self, left, left_scale, left_format, right, right_scale, right_format, fast, left_packed, right_packed, total
    ):
        a = values(left.data, left_scale, left_format, left_packed)
        b = values(np.ascontiguousarray(right.data.T), right_scale, right_format, right_packed)
        return interpreter.TensorHandle((a @ b.T).astype(np.float32) + total.data, total.dtype.scalar)

    semantic.dot_scaled, builder.create_dot_scaled = dot_scaled, create_dot_scaled
