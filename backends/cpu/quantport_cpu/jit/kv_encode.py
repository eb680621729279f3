"""Generates the quantization of new rows of the KV cache: ``quantport.kvcache.rows.encode`` in one launch."""

from __future__ import annotations

from typing import Any

from numba import literally, njit
from numba.core import types

from quantport.backend import once
from quantport_cpu.jit.elements import NUMBERS, element_of
from quantport_cpu.jit.encode import ZERO_SCALE, encode_integers
from quantport_cpu.jit.kv_attention import LANES, row_of
from quantport_cpu.jit.minifloat_encode import encode_minifloat, pack_codes
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import as_bits, as_float, store_uint16, words
from quantport_cpu.jit.simd import F16, F32, I32, I64, Simd, Value, inline

BF16, FP16, FP32 = 0, 1, 2
_NOT_FINITE, _NAN = 0x7F800000, 0x7FC00000  # bits of fp32: Inf, above which all are NaN; a NaN


def _load(simd: Simd, address: Value, dtype: int) -> Value:
    """16 elements of a dtype as fp32."""
    if dtype == BF16:
        return simd.load_bf16(LANES, address)
    if dtype == FP16:
        return simd.half_to_float(simd.load(F16, LANES, address))
    return simd.load(F32, LANES, address)


@inline(types.int64, 1, 2)
def largest(simd: Simd, source: Value, width: int, dtype: int) -> Value:
    """Bits of the largest magnitude of a row as fp32; NaN and Inf are larger than all numbers."""
    (best,) = simd.variables(simd.splat(0, LANES, I32), 1)
    with simd.steps(I64(width), LANES) as i:
        x = _load(simd, simd.at(source, simd.b.mul(i, I64(item_bytes(dtype)))), dtype)
        magnitude = simd.int_op("and_", simd.bitcast(x, I32), 0x7FFFFFFF)
        simd.b.store(simd.intrinsic("umax", simd.b.load(best), magnitude), best)
    return simd.b.zext(simd.reduce_lanes(simd.b.load(best), "umax"), I64)


@inline(types.void, 3, 4, 5)
def encode(simd: Simd, source: Value, to: Value, scale: Value, width: int, number: int, dtype: int) -> None:
    """The codes of a row over its scale."""
    element = element_of(number)
    scales = simd.splat(scale, LANES)
    with simd.steps(I64(width), LANES) as i:
        x = _load(simd, simd.at(source, simd.b.mul(i, I64(item_bytes(dtype)))), dtype)
        q = simd.b.fdiv(x, scales)
        if element.exponent:
            codes = encode_minifloat(simd, q, element)
        else:
            offset = 8 if element.bits == 4 else 0
            codes = encode_integers(simd, q, -element.high - 1, element.high, offset)
            codes = simd.int_op("and_", codes, (1 << element.bits) - 1)
        at = simd.at(to, simd.b.lshr(simd.b.mul(i, I64(element.bits)), I64(3)))
        simd.store(pack_codes(simd, codes, element.bits), at)


def item_bytes(dtype: int) -> int:
    """Bytes of an element."""
    return 4 if dtype == FP32 else 2


@njit(error_model="numpy")
def _encode_row(source, to, half_range, width, number, dtype):
    width, number, dtype = literally(width), literally(number), literally(dtype)
    bits = as_bits(as_float(largest(source, width, dtype)) / half_range)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16 if bits < _NOT_FINITE else _NAN
    if bits == 0:
        bits = ZERO_SCALE
    encode(source, to, as_float(bits), width, number, dtype)
    store_uint16(to + row_of(width, number) - 2, 0, bits >> 16)


def _body(k_width: int, v_width: int, number: int, dtype: int, item: int) -> Any:
    def encode_rows(frame):
        k, v, k_out, v_out = words(frame, 2, 4)
        k_batch, k_head, v_batch, v_head = words(frame, 6, 4)
        heads, tokens, span, half_range = words(frame, 10, 4)
        spans = (tokens + span - 1) // span
        half = as_float(half_range)
        while True:
            block = next_block(frame)
            if block >= block_count(frame):
                break
            pair, first = block // spans, block % spans * span
            batch, head = pair // heads, pair % heads
            k_to, v_to = k_out + batch * k_batch + head * k_head, v_out + batch * v_batch + head * v_head
            for token in range(first, min(tokens, first + span)):
                row = item * (pair * tokens + token)
                _encode_row(
                    k + row * k_width, k_to + token * row_of(k_width, number), half, k_width, number, dtype
                )
                _encode_row(
                    v + row * v_width, v_to + token * row_of(v_width, number), half, v_width, number, dtype
                )

    return encode_rows


@once
def kernel(element: str, key_width: int, value_width: int, dtype: int) -> Kernel:
    """Encodes keys and values of these widths, multiples of 16, to a format.

    A block is a span of tokens of one head. Words: the states, where their rows go, bytes from batch to batch
    and from head to head of those, heads, tokens, tokens of a span, the bits of the format's half range.
    """
    return Kernel(_body(key_width, value_width, NUMBERS[element], dtype, item_bytes(dtype)))
