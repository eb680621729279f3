"""Single values and runs of bytes in memory, for compiled functions. Addresses are int64."""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.core.types.containers import UniTuple
from numba.extending import intrinsic

from quantport_cpu.jit.simd import F32, I8, I16, I32, I64, Simd, Value, inline
from quantport_cpu.jit.target import host_target


@inline(types.float32)
def as_float(simd: Simd, bits: Value) -> Value:
    """The fp32 of the low 32 bits of an integer."""
    return simd.b.bitcast(simd.b.trunc(bits, I32), F32)


@inline(types.int64)
def as_bits(simd: Simd, value: Value) -> Value:
    """The bits of an fp32 as an integer."""
    return simd.b.zext(simd.b.bitcast(value, I32), I64)


def _words(context: Any, address: Any, first: Any, count: Any) -> Any:
    """``count`` elements of an array of int64 from element ``first`` on, as a tuple. Both are literals."""
    start, length = first.literal_value, count.literal_value

    def generate(context: Any, builder: Any, typed: Any, values: Any) -> Value:
        simd = Simd(builder, host_target())
        loaded = [simd.load(I64, 0, simd.at(values[0], 8 * i)) for i in range(start, start + length)]
        return context.make_tuple(builder, typed.return_type, loaded)

    return UniTuple(types.int64, length)(types.int64, first, count), generate


words = intrinsic(prefer_literal=True)(_words)


@inline(types.int64)
def load_uint32(simd: Simd, address: Value, index: Value) -> Value:
    """An element of an array of uint32."""
    return simd.b.zext(simd.load(I32, 0, simd.at(address, simd.b.mul(index, I64(4)))), I64)


@inline(types.void)
def store_uint32(simd: Simd, address: Value, index: Value, value: Value) -> None:
    """Sets an element of an array of uint32."""
    simd.store(simd.b.trunc(value, I32), simd.at(address, simd.b.mul(index, I64(4))))


@inline(types.void)
def store_uint16(simd: Simd, address: Value, index: Value, value: Value) -> None:
    """Sets an element of an array of uint16."""
    simd.store(simd.b.trunc(value, I16), simd.at(address, simd.b.mul(index, I64(2))))


@inline(types.int64)
def load_uint8(simd: Simd, address: Value) -> Value:
    """The byte at an address."""
    return simd.b.zext(simd.load(I8, 0, address), I64)


@inline(types.void)
def store_uint8(simd: Simd, address: Value, value: Value) -> None:
    """Sets the byte at an address."""
    simd.store(simd.b.trunc(value, I8), address)


@inline(types.void)
def copy_bytes(simd: Simd, to: Value, source: Value, size: Value) -> None:
    """Copies ``size`` bytes."""
    simd.copy(to, source, size)


@inline(types.void)
def clear(simd: Simd, address: Value, size: Value) -> None:
    """Sets ``size`` bytes to zero."""
    with simd.steps(size, 1) as i:
        simd.store(I8(0), simd.at(address, i))


@inline(types.void)
def clear_by_16(simd: Simd, address: Value, size: Value) -> None:
    """Sets ``size`` bytes to zero, 16 at a time: it is a multiple of 16."""
    with simd.steps(size, 16) as i:
        simd.store(simd.splat(0, 16, I8), simd.at(address, i))
