"""Generates the softmax of attention scores that come in chunks, and the joining of its parts.

The state of a row is its largest score so far, the sum of its exponentials, and the factor of what was summed
before the last chunk: three fp32 at the start of 16. A row whose scores are all -Inf gives zeros.
"""

from __future__ import annotations

from llvmlite import ir  # llvmlite has no types
from numba.core import types

from quantport_cpu.jit.simd import F32, I32, I64, Simd, Value, inline

LANES = 16
STATE_BYTES = 64
LOWEST = 0xFF7FFFFF  # bits of the lowest fp32, the largest score of no token
_LEAST = -87.0  # below it the exponential counts for nothing
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# of exp(x) - 1 - x over x * x, highest power first: Cephes, expf.c
_POWERS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_ROUND = 1.5 * 2.0**23  # added to a small fp32, it leaves no room for a fraction


def exp(simd: Simd, x: Value) -> Value:
    """e to the power of fp32 that are at most 0: within 2 units in the last place, 0 below -87, NaN of
    NaN.
    """

    def constant(value: float) -> Value:
        return simd.splat(value, x.type.count, F32)

    is_tiny = simd.b.fcmp_ordered("<", x, constant(_LEAST))
    x = simd.b.select(is_tiny, constant(_LEAST), x)
    shifted = simd.intrinsic("fma", x, constant(1.4426950408889634), constant(_ROUND))
    whole = simd.b.fsub(shifted, constant(_ROUND))
    rest = simd.intrinsic("fma", whole, constant(-_LN2_HIGH), x)
    rest = simd.intrinsic("fma", whole, constant(-_LN2_LOW), rest)
    value = constant(_POWERS[0])
    for power in _POWERS[1:]:
        value = simd.intrinsic("fma", value, rest, constant(power))
    value = simd.intrinsic("fma", simd.b.fmul(value, rest), rest, simd.b.fadd(rest, constant(1.0)))
    exponent = simd.int_op("add", simd.int_op("shl", simd.bitcast(shifted, I32), 23), 127 << 23)
    return simd.b.select(is_tiny, constant(0.0), simd.b.fmul(value, simd.bitcast(exponent, F32)))


def _exp_of(simd: Simd, x: Value) -> Value:
    """``exp`` of a single fp32."""
    return simd.b.extract_element(exp(simd, simd.splat(x, LANES)), I32(0))


@inline(types.void)
def softmax(
    simd: Simd,
    scores: Value,
    key_scales: Value,
    value_scales: Value,
    scale: Value,
    mask: Value,
    count: Value,
    state: Value,
) -> None:
    """Turns ``count`` products of a query row and keys into the weights of values as stored.

    A score is product * scale of the key * ``scale`` + mask. Everything is read and written in steps of 16;
    what lies past ``count`` counts for nothing.
    """
    steps = simd.b.add(count, I64(LANES - 1))
    largest = simd.load(F32, 0, state)
    (best,) = simd.variables(simd.splat(largest, LANES), 1)
    (total,) = simd.variables(simd.splat(0.0, LANES, F32), 1)
    lanes, count32 = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES))), simd.b.trunc(count, I32)
    with simd.steps(steps, LANES) as i:
        place = simd.b.shl(i, I64(2))
        at = simd.at(scores, place)
        factor = simd.b.fmul(simd.load(F32, LANES, simd.at(key_scales, place)), simd.splat(scale, LANES))
        value = simd.b.fmul(simd.load(F32, LANES, at), factor)
        value = simd.b.fadd(value, simd.load(F32, LANES, simd.at(mask, place)))
        left = simd.splat(simd.b.sub(count32, simd.b.trunc(i, I32)), LANES)
        value = simd.b.select(
            simd.b.icmp_signed("<", lanes, left), value, simd.splat(float("-inf"), LANES, F32)
        )
        simd.store(value, at)
        simd.b.store(simd.larger(value, simd.b.load(best)), best)
    now = simd.reduce_lanes(simd.b.load(best), "larger")
    shift = simd.splat(now, LANES)
    with simd.steps(steps, LANES) as i:
        place = simd.b.shl(i, I64(2))
        at = simd.at(scores, place)
        weight = exp(simd, simd.b.fsub(simd.load(F32, LANES, at), shift))
        simd.b.store(simd.b.fadd(simd.b.load(total), weight), total)
        simd.store(simd.b.fmul(weight, simd.load(F32, LANES, simd.at(value_scales, place))), at)
    factor = _exp_of(simd, simd.b.fsub(largest, now))
    before = simd.b.fmul(simd.load(F32, 0, simd.at(state, 4)), factor)
    simd.store(now, state)
    simd.store(simd.b.fadd(before, simd.reduce_lanes(simd.b.load(total))), simd.at(state, 4))
    simd.store(factor, simd.at(state, 8))


@inline(types.void)
def join(
    simd: Simd, parts: Value, states: Value, stride: Value, count: Value, out: Value, width: Value
) -> None:
    """The output of one query row from ``count`` parts of the tokens, which are overwritten.

    Args:
        simd: What writes it.
        parts: The weighted sums of the first part; ``width`` is a multiple of 16.
        states: Its state.
        stride: Bytes from a part to the next.
        count: Parts.
        out: The output.
        width: Elements of it.
    """
    largest, total = simd.variables(F32(0), 2)
    simd.b.store(simd.load(F32, 0, states), largest)
    with simd.steps(count, 1) as part:
        here = simd.load(F32, 0, simd.at(states, simd.b.mul(part, stride)))
        simd.b.store(simd.larger(here, simd.b.load(largest)), largest)
    with simd.steps(count, 1) as part:
        state = simd.at(states, simd.b.mul(part, stride))
        factor = _exp_of(simd, simd.b.fsub(simd.load(F32, 0, state), simd.b.load(largest)))
        simd.store(factor, simd.at(state, 8))
        summed = simd.b.fmul(simd.load(F32, 0, simd.at(state, 4)), factor)
        simd.b.store(simd.b.fadd(simd.b.load(total), summed), total)
    is_empty = simd.b.fcmp_ordered("==", simd.b.load(total), F32(0))
    inverse = simd.b.select(is_empty, F32(0), simd.b.fdiv(F32(1), simd.b.load(total)))
    (into,) = simd.variables(simd.splat(0.0, LANES, F32), 1)
    with simd.steps(width, LANES) as i:
        place = simd.b.shl(i, I64(2))
        simd.b.store(simd.splat(0.0, LANES, F32), into)
        with simd.steps(count, 1) as part:
            at = simd.b.mul(part, stride)
            factor = simd.splat(simd.load(F32, 0, simd.at(simd.at(states, at), 8)), LANES)
            value = simd.load(F32, LANES, simd.at(simd.at(parts, at), place))
            simd.b.store(simd.intrinsic("fma", value, factor, simd.b.load(into)), into)
        simd.store(simd.b.fmul(simd.b.load(into), simd.splat(inverse, LANES)), simd.at(out, place))
