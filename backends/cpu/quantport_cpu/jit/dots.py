"""Few rows of activations times e4m3fn or int8 rows of weights: each weight is read once, decoded in
registers.
"""

from __future__ import annotations

from itertools import chain

from numba.core import types

from quantport_cpu.jit.emit import F16, F32, I8, I16, I32, I64, Simd, Value, cgutils, inline
from quantport_cpu.jit.frame import Kernel, take, word

ROWS = 2  # weight rows that one tile reads side by side
STEP = 64  # weights of one row in one step; activations are padded to it
AHEAD = 8192  # bytes that are asked for ahead: past the page, where the processor's own prefetch ends
DIGIT_ZERO = 0x808080  # what the three base-256 digits of an activation of zero spell


def halves(simd: Simd, address: Value) -> Value:
    """32 e4m3fn codes as fp16, value / 256: the exponent moves from bias 7 to bias 15, subnormals
    included.
    """
    wide = simd.widen(simd.load(I8, 32, address), I16, signed=True)
    return simd.bits(simd.integer("and_", simd.integer("shl", wide, 7), ~0x4000), F16)


def _fp8_step(simd: Simd, x: Value, x_stride: Value, weights: list[Value], sums: list[list[Value]]) -> None:
    """Adds 64 products to each of ``sums[row * M + m]``, which are lists of partial sums."""
    n_m = len(sums) // len(weights)
    for part in (0, 32):
        values = []
        for address in weights:
            half = halves(simd, simd.at(address, part))
            quarters = [simd.shuffle(half, half, range(i, i + 16)) for i in (0, 16)]
            values.append([simd.real(q) for q in quarters])
        for m in range(n_m):
            row = simd.at(x, simd.b.mul(x_stride, I64(m)))
            for i in (0, 1):
                xs = simd.load(F32, 16, simd.at(row, 4 * (part + 16 * i)))
                for r in range(len(weights)):
                    parts = sums[r * n_m + m]
                    variable = parts[(part // 16 + i) % len(parts)]
                    simd.b.store(simd.same("fma", values[r][i], xs, simd.b.load(variable)), variable)


@inline(types.void, 10)
def fp8_tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    w: Value,
    w_stride: Value,
    k: Value,
    chunk: Value,
    scale: Value,
    scale_step: Value,
    out: Value,
    out_stride: Value,
    n_m: int,
) -> None:
    """Two weight rows times ``n_m`` rows of x; a scale for every ``chunk`` columns. ``w_stride`` 0 repeats
    the row.
    """
    zero = simd.splat(0.0, 16, F32)
    totals = simd.variables(zero, ROWS * n_m)
    sums = [simd.variables(zero, max(1, 4 // n_m)) for _ in totals]
    rows = [simd.at(w, simd.b.mul(w_stride, I64(r))) for r in range(ROWS)]
    bounces = [simd.buffer(STEP) for _ in rows]
    with cgutils.for_range_slice(simd.b, I64(0), k, chunk, I64) as (begin, _):
        for part in chain.from_iterable(sums):
            simd.b.store(zero, part)
        left = simd.b.sub(k, begin)
        length = simd.b.select(simd.b.icmp_signed("<", left, chunk), left, chunk)
        with simd.steps(length, STEP) as i:
            place = simd.b.add(begin, i)
            here = [simd.at(row, place) for row in rows]
            for address in here:
                simd.prefetch(simd.at(address, AHEAD))
            _fp8_step(simd, simd.at(x, simd.b.mul(place, I64(4))), x_stride, here, sums)
        with simd.rest(length, STEP) as (start, size):
            place = simd.b.add(begin, start)
            for row, bounce in zip(rows, bounces, strict=True):
                simd.copy(bounce, simd.at(row, place), size)
            _fp8_step(simd, simd.at(x, simd.b.mul(place, I64(4))), x_stride, bounces, sums)
        index = simd.b.mul(simd.b.sdiv(begin, chunk), scale_step)
        factor = simd.b.fmul(simd.load(F32, 0, simd.at(scale, index)), F32(256.0))
        for total, parts in zip(totals, sums, strict=True):
            value = simd.add([simd.b.load(part) for part in parts])
            simd.b.store(simd.same("fma", value, simd.splat(factor, 16), simd.b.load(total)), total)
    for r in range(ROWS):
        column = simd.b.select(simd.b.icmp_signed("==", w_stride, I64(0)), I64(0), I64(4 * r))
        for m in range(n_m):
            address = simd.at(simd.at(out, column), simd.b.mul(out_stride, I64(m)))
            simd.store(simd.total(simd.b.load(totals[r * n_m + m])), address)


def _fp8(frame):
    """A block is ``span`` weight rows, of one row of scales."""
    x, x_stride, w, n, k = word(frame, 2), word(frame, 3), word(frame, 4), word(frame, 5), word(frame, 6)
    scale, scale_step, scale_stride, chunk = word(frame, 7), word(frame, 8), word(frame, 9), word(frame, 10)
    out, out_stride, m, span = word(frame, 11), word(frame, 12), word(frame, 13), word(frame, 14)
    while True:
        block = take(frame)
        if block >= word(frame, 1):
            break
        s = scale + (block * span >> 7) * scale_stride
        for row in range(block * span, min(n, block * span + span), 2):
            stride = k if row + 1 < n else 0
            here, to = w + row * k, out + 4 * row
            if m == 1:
                fp8_tile(x, x_stride, here, stride, k, chunk, s, scale_step, to, out_stride, 1)
            elif m == 2:
                fp8_tile(x, x_stride, here, stride, k, chunk, s, scale_step, to, out_stride, 2)
            elif m == 4:
                fp8_tile(x, x_stride, here, stride, k, chunk, s, scale_step, to, out_stride, 4)
            else:
                fp8_tile(x, x_stride, here, stride, k, chunk, s, scale_step, to, out_stride, 8)


def _whole(simd: Simd, plain: Value, digits: list[Value]) -> Value:
    """fp32 sum of products from the exact sums of three digits, and the sum of the weights for their zero
    points.
    """
    plain, *sums = (simd.total(simd.widen(simd.b.load(v), I64, signed=True)) for v in (plain, *digits))
    value = simd.b.neg(simd.b.mul(plain, I64(DIGIT_ZERO)))
    for d, digit in enumerate(sums):
        value = simd.b.add(value, simd.b.shl(digit, I64(8 * d)))
    return simd.b.sitofp(value, F32)


@inline(types.void, 8)
def int8_tile(
    simd: Simd,
    x: Value,
    x_stride: Value,
    x_scale: Value,
    w: Value,
    w_stride: Value,
    k: Value,
    out: Value,
    out_stride: Value,
    n_m: int,
) -> None:
    """Two weight rows times ``n_m`` rows of x, each as three planes of u8 digits with zero point 128."""
    zero = simd.splat(0, 16, I32)
    sums = simd.variables(zero, ROWS * n_m * 3)
    plain = simd.variables(zero, ROWS)
    ones = simd.splat(0x01010101, 16, I32)
    rows = [simd.at(w, simd.b.mul(w_stride, I64(r))) for r in range(ROWS)]
    plane = simd.b.udiv(x_stride, I64(3))

    def step(place: Value, weights: list[Value]) -> None:
        values = [simd.load(I32, 16, address) for address in weights]
        for value, variable in zip(values, plain, strict=True):
            simd.b.store(simd.dot4(simd.b.load(variable), ones, value), variable)
        for md in range(3 * n_m):
            digit = simd.load(I32, 16, simd.at(simd.at(x, place), simd.b.mul(plane, I64(md))))
            for r, value in enumerate(values):
                variable = sums[r * n_m * 3 + md]
                simd.b.store(simd.dot4(simd.b.load(variable), digit, value), variable)

    with simd.steps(k, STEP) as i:
        here = [simd.at(row, i) for row in rows]
        for address in here:
            simd.prefetch(simd.at(address, AHEAD))
        step(i, here)
    with simd.rest(k, STEP) as (start, size):
        bounces = [simd.buffer(STEP) for _ in rows]
        for row, bounce in zip(rows, bounces, strict=True):
            simd.copy(bounce, simd.at(row, start), size)
        step(start, bounces)
    for r in range(ROWS):
        column = simd.b.select(simd.b.icmp_signed("==", w_stride, I64(0)), I64(0), I64(4 * r))
        for m in range(n_m):
            first = (r * n_m + m) * 3
            scaled = simd.b.fmul(
                _whole(simd, plain[r], sums[first : first + 3]), simd.load(F32, 0, simd.at(x_scale, 4 * m))
            )
            simd.store(scaled, simd.at(simd.at(out, column), simd.b.mul(out_stride, I64(m))))


def _int8(frame):
    """A block is ``span`` weight rows."""
    x, x_stride, x_scale, w, n = (
        word(frame, 2),
        word(frame, 3),
        word(frame, 4),
        word(frame, 5),
        word(frame, 6),
    )
    k, out, out_stride, m, span = (
        word(frame, 7),
        word(frame, 8),
        word(frame, 9),
        word(frame, 10),
        word(frame, 11),
    )
    while True:
        block = take(frame)
        if block >= word(frame, 1):
            break
        for row in range(block * span, min(n, block * span + span), 2):
            stride = k if row + 1 < n else 0
            here, to = w + row * k, out + 4 * row
            if m == 1:
                int8_tile(x, x_stride, x_scale, here, stride, k, to, out_stride, 1)
            else:
                for i in range(0, m, 2):
                    int8_tile(
                        x + i * x_stride,
                        x_stride,
                        x_scale + 4 * i,
                        here,
                        stride,
                        k,
                        to + i * out_stride,
                        out_stride,
                        2,
                    )


fp8_kernel = Kernel(_fp8)
int8_kernel = Kernel(_int8)
