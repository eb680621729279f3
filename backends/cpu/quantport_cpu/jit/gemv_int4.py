"""Generates the products of a small batch with int4 weights in ATen's packed layout of 64 channels."""

from __future__ import annotations

from numba import njit
from numba.core import types

from quantport_cpu.jit.gemv_bytes import PREFETCH_AHEAD
from quantport_cpu.jit.parallel_for import Kernel, block_count, next_block
from quantport_cpu.jit.scalars import words
from quantport_cpu.jit.simd import F32, I8, I16, I32, I64, Simd, Value, cgutils, inline

BLOCK = 64  # channels of one block; for each column 32 bytes, byte j holds channels j (low) and j + 32


def _interleave(lanes: int, high: int) -> list[int]:
    """x86's byte and word unpacking: interleaves the low or high halves of each 128 bits of two vectors."""
    per = lanes // 4
    return [
        i + side
        for lane in range(4)
        for i in range(per * lane + per // 2 * high, per * lane + per // 2 * (high + 1))
        for side in (0, lanes)
    ]


def _columns(simd: Simd, w: Value, high: int) -> list[Value]:
    """Eight columns of a block as two vectors, for 8 + 8 of its 32 bytes (``high`` or not).

    Each 32-bit lane holds four columns of one byte: columns 0, 2, 4, 6 in the low half of the vector, 1, 3,
    5, 7 in the high half. The first vector is of bytes 0-3 and 16-19 (+ 8 * high), the second of 4-7 and
    20-23.
    """
    a, b, c, d = (simd.load(I8, 64, simd.at(w, 64 * i)) for i in range(4))
    low, top = (
        simd.bitcast(simd.shuffle(pair[0], pair[1], _interleave(64, high)), I16, 32)
        for pair in ((a, b), (c, d))
    )
    return [simd.bitcast(simd.shuffle(low, top, _interleave(32, h)), I32, 16) for h in (0, 1)]


def _even_odd(simd: Simd, even: Value, odd: Value) -> Value:
    """``even`` in the low half of 16 lanes, ``odd`` in the high half."""
    return simd.shuffle(simd.splat(even, 16), simd.splat(odd, 16), [*range(8), *range(24, 32)])


def _fold(simd: Simd, p: Value, q: Value) -> Value:
    """Adds even to odd columns of the two vectors of ``_columns``: 16 bytes in order."""
    return simd.b.add(
        *(
            simd.shuffle(
                p, q, [*range(i, i + 4), *range(i + 16, i + 20), *range(i + 4, i + 8), *range(i + 20, i + 24)]
            )
            for i in (0, 8)
        )
    )


class _Sums:
    """The integer sums of one group and one half of the bytes, for ``n_m`` rows.

    ``variables`` are [row][digit][vector][sum of whole bytes, or of low nibbles].
    """

    def __init__(self, simd: Simd, n_m: int) -> None:
        self.simd, self.n_m = simd, n_m
        self.variables = simd.variables(simd.splat(0, 16, I32), n_m * 12)

    def start(self, sums: Value, stride: Value) -> None:
        """Starts with -8 (low nibble) and -136 (byte) times the sum of x, so that codes are signed."""
        s = self.simd
        for m in range(self.n_m):
            for d in range(3):
                at = s.at(s.at(sums, s.b.mul(stride, I64(m))), 16 * d)
                loaded = [s.load(I32, 0, s.at(at, 4 * i)) for i in range(4)]
                low, whole = (_even_odd(s, loaded[i], loaded[i + 1]) for i in (0, 2))
                for v in (0, 1):
                    s.b.store(whole, self.variables[m * 12 + d * 4 + v * 2])
                    s.b.store(low, self.variables[m * 12 + d * 4 + v * 2 + 1])

    def step(self, vectors: list[Value], x: Value, stride: Value) -> None:
        """Adds eight columns."""
        s = self.simd
        lows = [s.int_op("and_", v, 0x0F0F0F0F) for v in vectors]
        plane = s.b.udiv(stride, I64(3))
        for md in range(3 * self.n_m):
            at = s.at(x, s.b.mul(plane, I64(md)))
            digit = _even_odd(s, s.load(I32, 0, at), s.load(I32, 0, s.at(at, 4)))
            for v in (0, 1):
                for i, bytes_ in enumerate((vectors[v], lows[v])):
                    variable = self.variables[md * 4 + v * 2 + i]
                    s.b.store(s.dot4(s.b.load(variable), bytes_, digit), variable)

    def finish(self, m: int) -> tuple[Value, Value]:
        """fp32 sums of 16 low nibbles and of 16 high nibbles."""
        s = self.simd
        parts: list[list[Value]] = [[], []]
        for v in (0, 1):
            bytes_, low = (
                [s.b.load(self.variables[m * 12 + d * 4 + v * 2 + i]) for d in range(3)] for i in (0, 1)
            )
            high = [s.b.sub(b, a) for b, a in zip(bytes_, low, strict=True)]
            for i, digits in enumerate((low, high)):
                parts[i].append((s.b.add(digits[0], s.int_op("shl", digits[1], 8)), digits[2]))
        out = []
        for (p, q), unit in zip(parts, (1.0, 1 / 16), strict=True):
            small, large = (
                s.b.fmul(s.int_to_float(_fold(s, p[i], q[i])), s.splat(f * unit, 16, F32))
                for i, f in enumerate((1.0, 65536.0))
            )
            out.append(s.b.fadd(small, large))
        return out[0], out[1]


def _scales_and_zeros(simd: Simd, pairs: Value, channel: int) -> tuple[Value, Value]:
    """fp32 scales and offsets of channels ``channel`` to + 7 and + 16 to + 23, from pairs of bf16."""
    parts = [simd.load(I32, 8, simd.at(pairs, 4 * (channel + i))) for i in (0, 16)]
    both = simd.shuffle(parts[0], parts[1], range(16))
    scales, offsets = simd.int_op("shl", both, 16), simd.int_op("and_", both, -65536)
    return simd.bitcast(scales, F32), simd.bitcast(offsets, F32)


def _group_sum(simd: Simd, sums: Value) -> Value:
    """Sum of x over a group in units of its scale, in every lane, from -8 times the sums of its digits."""
    value = I64(0)
    for d in range(3):
        for parity in (0, 4):
            part = simd.b.sext(simd.load(I32, 0, simd.at(sums, 16 * d + parity)), I64)
            value = simd.b.add(value, simd.b.shl(part, I64(8 * d)))
    return simd.splat(simd.b.fmul(simd.b.sitofp(value, F32), F32(-1 / 8)), 16)


@inline(types.void, 12)
def int4_tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    sums: Value,
    sums_stride: Value,
    x_scale: Value,
    w: Value,
    k: Value,
    group: Value,
    pairs: Value,
    pairs_stride: Value,
    out: Value,
    out_stride: Value,
    n_m: int,
) -> None:
    """64 channels times ``n_m`` rows of x, given as s8 digits with their sums per group."""
    totals = [[simd.variables(simd.splat(0.0, 16, F32), 2) for _ in range(n_m)] for _ in (0, 1)]
    with cgutils.for_range_slice(simd.b, I64(0), k, group, I64) as (begin, count):
        here = simd.at(w, simd.b.mul(begin, I64(BLOCK // 2)))
        scales = simd.at(pairs, simd.b.mul(count, pairs_stride))
        for high in (0, 1):
            acc = _Sums(simd, n_m)
            acc.start(simd.at(sums, simd.b.mul(count, I64(48))), sums_stride)
            with simd.steps(group, 8) as i:
                address = simd.at(here, simd.b.mul(i, I64(BLOCK // 2)))
                for line in range(0 if high else 4):
                    simd.prefetch(simd.at(address, PREFETCH_AHEAD + 64 * line))
                acc.step(_columns(simd, address, high), simd.at(x, simd.b.add(begin, i)), x_stride)
            for m in range(n_m):
                group_sums = simd.at(
                    simd.at(sums, simd.b.mul(count, I64(48))), simd.b.mul(sums_stride, I64(m))
                )
                x_sum = _group_sum(simd, group_sums)
                for nibble, value in enumerate(acc.finish(m)):
                    total = totals[high][m][nibble]
                    scale, zero = _scales_and_zeros(simd, scales, 32 * nibble + 8 * high)
                    value = simd.intrinsic("fma", value, scale, simd.b.fmul(x_sum, zero))
                    simd.b.store(simd.b.fadd(value, simd.b.load(total)), total)
    for high in (0, 1):
        for m in range(n_m):
            factor = simd.splat(simd.load(F32, 0, simd.at(x_scale, 4 * m)), 16)
            for nibble in (0, 1):
                value = simd.b.fmul(simd.b.load(totals[high][m][nibble]), factor)
                row = simd.at(simd.at(out, simd.b.mul(out_stride, I64(m))), 4 * (32 * nibble + 8 * high))
                for part in (0, 8):
                    simd.store(simd.shuffle(value, value, range(part, part + 8)), simd.at(row, 8 * part))


@njit(error_model="numpy")
def int4_rows(x, sums, x_scale, m, w, k, group, pairs, pairs_stride, out, out_stride):
    """64 channels times ``m`` rows of x."""
    x_stride, sums_stride = 3 * k, k // group * 48
    for i in range(0, m - 1, 2):
        # fmt: off
        int4_tile(
            x + i * x_stride, x_stride, sums + i * sums_stride, sums_stride, x_scale + 4 * i,
            w, k, group, pairs, pairs_stride, out + i * out_stride, out_stride, 2,
        )
    if m & 1:
        i = m - 1
        int4_tile(
            x + i * x_stride,
            x_stride,
            sums + i * sums_stride,
            sums_stride,
            x_scale + 4 * i,
            w,
            k,
            group,
            pairs,
            pairs_stride,
            out + i * out_stride,
            out_stride,
            1,
        )
        # fmt: on


def _int4(frame):
    """A block is 64 channels."""
    x, sums, x_scale, w, n = words(frame, 2, 5)
    k, group, pairs, pairs_stride, out, m = words(frame, 7, 6)
    while True:
        block = next_block(frame)
        if block >= block_count(frame):
            break
        here, scales, to = w + block * 32 * k, pairs + 256 * block, out + 256 * block
        int4_rows(x, sums, x_scale, m, here, k, group, scales, pairs_stride, to, 4 * n)


int4_kernel = Kernel(_int4)
