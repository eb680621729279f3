"""Blocks along a row of BF16 to codes with a scale each: MX, NVFP4, FP6 and the code books. A kernel for each
format.
"""

from __future__ import annotations

from typing import Any

from numba import literally, njit

from quantport.backend import once
from quantport_cpu.jit.elements import ELEMENTS, NUMBERS
from quantport_cpu.jit.encode import bits32, f32, get8, get32, magnitude, put8, put32
from quantport_cpu.jit.frame import Kernel, take, word
from quantport_cpu.jit.repack import move, wipe
from quantport_cpu.jit.search import float_search, power_search
from quantport_cpu.jit.small import divided, e4m3_scale, e4m3_value, e8m0_of, f32_scale, multiplied

E8M0, E4M3, F32_SCALE = 0, 1, 2  # how scales are stored


@njit(error_model="numpy")
def _block(source, to, out, index, add, emax, high, factor, n_format, group, n_lanes, kind, searched):
    n_format, group, n_lanes = literally(n_format), literally(group), literally(n_lanes)
    kind, searched = literally(kind), literally(searched)
    bits = magnitude(source, group) << 16
    if kind == E8M0:
        code = e8m0_of(bits, add, emax, high)
        if searched:
            code = power_search(source, code, n_format, group)
        put8(out + index, code)
        multiplied(source, to, group, code, n_format, n_lanes)
    elif kind == E4M3:
        code = e4m3_scale(factor * (f32(bits) / high))
        if searched:
            code = float_search(source, code, factor, n_format, group)
        put8(out + index, code)
        divided(source, to, group, e4m3_value(code) / factor, n_format, n_lanes)
    else:
        scale = f32(get32(out, index)) if add else f32_scale(bits, high)
        put32(out, index, bits32(scale))
        divided(source, to, group, scale, n_format, n_lanes)


def _body(n_format: int, group: int, n_lanes: int, kind: int, size: int, searched: int) -> Any:
    def rows(frame):
        source, source_stride, k, to, to_stride = (
            word(frame, 2),
            word(frame, 3),
            word(frame, 4),
            word(frame, 5),
            word(frame, 6),
        )
        out, bounce, add, emax = word(frame, 7), word(frame, 8), word(frame, 9), word(frame, 10)
        high, factor, tail = f32(word(frame, 11)), f32(word(frame, 12)), word(frame, 13)
        blocks = (k + group - 1) // group
        while True:
            row = take(frame)
            if row >= word(frame, 1):
                break
            for c in range(blocks):
                here, codes = source + row * source_stride + 2 * group * c, to + row * to_stride + size * c
                x, q, rest = here, codes, k - group * c
                if rest < group:
                    wipe(bounce, 3 * group)
                    move(bounce, here, 2 * rest)
                    x, q = bounce, bounce + 2 * group
                _block(
                    x,
                    q,
                    out,
                    row * blocks + c,
                    add,
                    emax,
                    high,
                    factor,
                    n_format,
                    group,
                    n_lanes,
                    kind,
                    searched,
                )
                if rest < group:
                    move(codes, q, to_stride - size * c)
            if tail:  # the unused half of a last byte is zero, whatever the code of zero is
                last = to + row * to_stride + to_stride - 1
                put8(last, get8(last) & 15)

    return rows


@once
def kernel(name: str, group: int, scale_kind: int, searched: bool) -> Kernel:
    """The kernel of one format.

    Words: source, its stride, k, codes, their stride, scales, buffer of 3 * group bytes, what the rule adds
    (fp32 scales: whether they are given), emax, the divisor of amax (fp32 bits), the global factor (fp32
    bits), whether half a byte is left over.
    """
    bits = ELEMENTS[name].bits
    return Kernel(_body(NUMBERS[name], group, min(group, 32), scale_kind, group * bits // 8, int(searched)))


def _tops(frame):
    """A block is a row. Words: source, its stride, k, largest magnitudes as fp32 [n]."""
    while True:
        row = take(frame)
        if row >= word(frame, 1):
            break
        put32(word(frame, 5), row, magnitude(word(frame, 2) + row * word(frame, 3), word(frame, 4)) << 16)


tops_kernel = Kernel(_tops)
