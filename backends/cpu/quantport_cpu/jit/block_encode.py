"""Quantizes rows of BF16 in blocks with a scale each: MX, NVFP4, FP6 and the code books.

There is a kernel for each format.
"""

from __future__ import annotations

from typing import Any

from numba import literally, njit

from quantport.backend import once
from quantport_cpu.jit.elements import ELEMENTS, NUMBERS
from quantport_cpu.jit.encode import largest_magnitude
from quantport_cpu.jit.minifloat_encode import (
    e4m3_scale_code,
    e4m3_value,
    e8m0_code,
    encode_by_power,
    encode_divided,
    fp32_scale,
)
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import (
    as_bits,
    as_float,
    clear_by_16,
    copy_bytes,
    load_uint8,
    load_uint32,
    store_uint8,
    store_uint32,
    words,
)
from quantport_cpu.jit.search import search_e4m3_scale, search_e8m0_scale

E8M0, E4M3, F32_SCALE = 0, 1, 2  # how scales are stored


@njit(error_model="numpy")
def _encode_block(source, to, out, index, add, emax, high, factor, n_format, group, n_lanes, kind, searched):
    n_format, group, n_lanes = literally(n_format), literally(group), literally(n_lanes)
    kind, searched = literally(kind), literally(searched)
    bits = largest_magnitude(source, group) << 16
    if kind == E8M0:
        code = e8m0_code(bits, add, emax, high)
        if searched:
            code = search_e8m0_scale(source, code, n_format, group)
        store_uint8(out + index, code)
        encode_by_power(source, to, group, code, n_format, n_lanes)
    elif kind == E4M3:
        code = e4m3_scale_code(factor * (as_float(bits) / high))
        if searched:
            code = search_e4m3_scale(source, code, factor, n_format, group)
        store_uint8(out + index, code)
        encode_divided(source, to, group, e4m3_value(code) / factor, n_format, n_lanes)
    else:
        scale = as_float(load_uint32(out, index)) if add else fp32_scale(bits, high)
        store_uint32(out, index, as_bits(scale))
        encode_divided(source, to, group, scale, n_format, n_lanes)


def _body(n_format: int, group: int, n_lanes: int, kind: int, size: int, searched: int) -> Any:
    def rows(frame):
        source, source_stride, k, to, to_stride = words(frame, 2, 5)
        out, bounce, add, emax = words(frame, 7, 4)
        high, factor, tail = words(frame, 11, 3)
        high, factor = as_float(high), as_float(factor)
        blocks = (k + group - 1) // group
        while True:
            row = next_block(frame)
            if row >= block_count(frame):
                break
            for c in range(blocks):
                here, codes = source + row * source_stride + 2 * group * c, to + row * to_stride + size * c
                x, q, rest = here, codes, k - group * c
                if rest < group:
                    clear_by_16(bounce, 3 * group)
                    copy_bytes(bounce, here, 2 * rest)
                    x, q = bounce, bounce + 2 * group
                index = row * blocks + c
                _encode_block(
                    x, q, out, index, add, emax, high, factor, n_format, group, n_lanes, kind, searched
                )
                if rest < group:
                    copy_bytes(codes, q, to_stride - size * c)
            if tail:  # the unused half of a last byte is zero, whatever the code of zero is
                last = to + row * to_stride + to_stride - 1
                store_uint8(last, load_uint8(last) & 15)

    return rows


@once
def kernel(name: str, group: int, scale_kind: int, searched: bool) -> Kernel:
    """The kernel of one format.

    Words: source, its stride, k, codes, their stride, scales, buffer of 3 * group bytes, what the rule adds
    (for fp32 scales: 1 to read them, 0 to write them), emax, the divisor of amax (fp32 bits), the global
    factor (fp32 bits), whether half a byte is left over.
    """
    bits = ELEMENTS[name].bits
    return Kernel(_body(NUMBERS[name], group, min(group, 32), scale_kind, group * bits // 8, int(searched)))


def _row_maxima(frame):
    """A block is a row. Words: source, its stride, k, largest magnitudes as fp32 [n]."""
    source, source_stride, k, maxima = words(frame, 2, 4)
    while True:
        row = next_block(frame)
        if row >= block_count(frame):
            break
        store_uint32(maxima, row, largest_magnitude(source + row * source_stride, k) << 16)


row_maxima_kernel = Kernel(_row_maxima)
