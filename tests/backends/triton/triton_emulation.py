"""Makes the arithmetic of Triton's interpreter that of GPUs: products and rounding of bf16, fused
multiply-add, and ``tl.dot_scaled`` with the formats of ml_dtypes and sums in fp64. Also spares it work that
changes no result.
"""

import dataclasses
import inspect
from functools import cache

import ml_dtypes
import numpy as np

FORMATS = {"E2M1": ml_dtypes.float4_e2m1fn, "E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}


def values(codes, scale, kind, packed_along_k=True):
    """An operand ``[rows, K]`` in fp64, from codes ``[rows, K]`` or ``[rows, K / 2]`` and scales for groups
    of 16 or 32.
    """
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
    """Patches the interpreter, once."""
    builder = interpreter.InterpreterBuilder
    if not hasattr(builder, "mended"):
        builder.mended = True
        _patching(interpreter)
        _bf16(interpreter, builder)
        if not hasattr(builder, "create_dot_scaled"):
            _dot_scaled(interpreter, builder)


def _patching(interpreter):
    """At every launch the interpreter searches all members of the language for builtins, which never change:
    their names are kept. And it computes each integer sum twice more to assert that it does not overflow,
    which is checked only with ``debug``.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    is_builtin = interpreter.tl.core.is_builtin

    @cache
    def names(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package, builder, scope):
        for name in names(package):
            member = getattr(package, name)
            if is_builtin(member):  # and is not patched already
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


def _bf16(interpreter, builder):
    """The interpreter stores bf16 as bits and multiplies those, truncates fp32 to bf16, and rounds the
    product of ``fma``.
    """
    tl, dot, cast = interpreter.tl, builder.create_dot, builder.cast_impl

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)  # exact

    def create_dot(self, a, b, d, *args):
        return dot(self, wide(a), wide(b), d, *args)

    def cast_impl(self, source, to):
        """Rounds to nearest even, as ``cvt.rn``."""
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    def create_fma(self, x, y, z):
        """The product is exact in fp64; the sum is rounded to odd there, so that fp32 rounds it only once."""
        product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
        total = product + addend
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        bits = total.view(np.int64)
        away = np.where((lost > 0) == (total > 0), 1, -1)
        odd = np.where((lost != 0) & np.isfinite(total) & (bits & 1 == 0), bits + away, bits)
        return interpreter.TensorHandle(odd.view(np.float64).astype(np.float32), z.dtype.scalar)

    builder.create_dot, builder.cast_impl, builder.create_fma = create_dot, cast_impl, create_fma


def _dot_scaled(interpreter, builder):
    """Adds ``dot_scaled``; formats may be strings, as in compiled code."""
    semantic = type(interpreter.interpreter_semantic)
    checked = semantic.dot_scaled

    def dot_scaled(self, left, left_scale, left_format, right, right_scale, right_format, *rest):
        formats = (interpreter.tl.constexpr(name) for name in (left_format, right_format))
        return checked(self, left, left_scale, next(formats), right, right_scale, next(formats), *rest)

    def create_dot_scaled(
        self,
        left,
        left_scale,
        left_format,
        right,
        right_scale,
        right_format,
        fast,
        left_packed,
        right_packed,
        total,
    ):
        a = values(left.data, left_scale, left_format, left_packed)
        b = values(np.ascontiguousarray(right.data.T), right_scale, right_format, right_packed)
        return interpreter.TensorHandle((a @ b.T).astype(np.float32) + total.data, total.dtype.scalar)

    semantic.dot_scaled, builder.create_dot_scaled = dot_scaled, create_dot_scaled
