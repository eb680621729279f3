"""int4 as it is stored: exact sums inside a group, any shape, each kind of code."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantport import numerics
from quantport.scheme.catalog import BUILTIN
from quantport_cpu import jit

UNAVAILABLE = jit.why_unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "numba is installed")

if not UNAVAILABLE:
    from quantport_cpu.jit import factors, int4_batch
    from quantport_cpu.jit.int4_batch import Int4, Layout
    from quantport_cpu.jit.jobs import Job

LAYOUTS = [
    (32, False, torch.bfloat16),
    (64, True, torch.bfloat16),
    (128, False, torch.bfloat16),
    (256, True, torch.bfloat16),
    (32, True, torch.float32),
    (64, False, torch.float16),
    (128, True, torch.float32),
    (128, True, torch.float16),
    (1 << 30, False, torch.float16),
    (1 << 30, True, torch.float32),
]
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Kind = tuple[int, bool, torch.dtype]
SHAPES = [(1, 1), (3, 33), (37, 300), (66, 1100)]


def layout_of(group: int, has_zero: bool, dtype: torch.dtype) -> Layout:
    return Layout(group, has_zero, factors.DTYPES.index(dtype))


def stored(
    n: int,
    k: int,
    group: int,
    has_zero: bool,
    dtype: torch.dtype = torch.bfloat16,
    exponents: bool = False,
) -> Int4:
    """A weight of random codes; with ``exponents`` scales are powers of two near each other. Scales in fp32
    are numbers of 16 bits, as checkpoints have them: a code times one is exact, and the sum is rounded once.
    """
    codes = numerics.pack_int4(torch.randint(-8, 8, (n, k), dtype=torch.int8))
    shape = n, math.ceil(k / group)
    scale = 2.0 ** torch.randint(-2, 1, shape) if exponents else torch.randn(shape).half()
    zero = torch.randint(-8, 8, shape) / 4 if exponents else torch.randn(shape)
    return Int4(codes, scale.to(dtype), zero.to(dtype) if has_zero else None)


def values(weight: Int4, k: int, group: int) -> Tensor:
    """The weight in fp64."""
    scale, zero = (
        0 if part is None else part.double().repeat_interleave(min(group, k), 1)[:, :k] for part in weight[1:]
    )
    return numerics.unpack_int4(weight.codes, k).double() * scale + zero


def one(m: int) -> list[Job]:
    return [Job(0, m, 0, 0)]


def close(got: Tensor, x: Tensor, weight: Tensor) -> None:
    want = x.double() @ weight.t()
    assert got.dtype is torch.float32
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_int8_activations_are_multiplied_exactly(layout: Kind, shape: tuple[int, int], m: int) -> None:
    """Scales are powers of two: no sum in fp32 is rounded, in whatever order."""
    (n, k), group = shape, layout[0]
    weight, q = stored(n, k, *layout, exponents=True), torch.randint(-128, 128, (m, k), dtype=torch.int8)
    token = torch.rand(m, 1) + 0.1
    want = (q.double() @ values(weight, k, group).t()).float() * token
    assert torch.equal(
        int4_batch.multiply(int4_batch.prepared(q, token, layout_of(*layout)), one(m), weight, n), want
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_16_bit_activations(layout: Kind, shape: tuple[int, int], dtype: torch.dtype) -> None:
    (n, k), weight = shape, stored(*shape, *layout)
    for m in (1, 2, 4, 7):
        x = (torch.randn(m, k) + 3).to(dtype)  # a mean: the 8 of a stored code must not cost digits
        close(
            int4_batch.multiply(int4_batch.split(x, layout_of(*layout)), one(m), weight, n),
            x,
            values(weight, k, layout[0]),
        )
        close(
            int4_batch.multiply_fp32(x, one(m), weight, layout_of(*layout), n),
            x,
            values(weight, k, layout[0]),
        )


@pytest.mark.parametrize("digit", [-8, 7])
def test_no_sum_overflows(digit: int) -> None:
    k = 1 << 20
    codes = numerics.pack_int4(torch.full((3, k), digit, dtype=torch.int8))
    weight = Int4(codes, torch.ones(3, k // 128, dtype=torch.bfloat16))
    q = torch.full((2, k), -128, dtype=torch.int8)
    rows = int4_batch.prepared(q, torch.ones(2, 1), Layout(128, False))
    want = torch.full((2, 3), float(-128 * digit * k))
    assert torch.equal(int4_batch.multiply(rows, one(2), weight, 3), want)
    x = torch.full((2, k), 3.0)
    got = int4_batch.multiply(int4_batch.split(x, Layout(128, False)), one(2), weight, 3)
    torch.testing.assert_close(got, torch.full((2, 3), 3.0 * digit * k), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_panels_are_those_of_the_reference(shape: tuple[int, int], layout: Kind) -> None:
    (n, k), weight = shape, stored(*shape, *layout)
    scheme = BUILTIN["int4_mse" if layout[1] else "int4_weight_only"]
    block = 0 if layout[0] > k else layout[0]
    scheme = replace(scheme, weight=replace(scheme.weight, block_shape=(1, block), scale=NAMES[layout[2]]))
    names = ("weight_packed", "weight_scale", "weight_zero")
    tensors = {name: t for name, t in zip(names, weight, strict=True) if t is not None}
    panel = torch.empty(n, -(-k // 32) * 32, dtype=torch.bfloat16)
    int4_batch.decode(weight, k, layout_of(*layout), panel)
    assert torch.equal(panel[:, :k], numerics.dequantize_weight(tensors, scheme, k, torch.bfloat16))
    assert torch.isfinite(panel).all()


def test_groups_of_rows_meet_their_own_weights() -> None:
    layout, weights = Layout(64, True), [stored(40, 100, 64, True, exponents=True) for _ in range(3)]
    q, token = torch.randint(-128, 128, (9, 100), dtype=torch.int8), torch.ones(9, 1)
    stack = Int4(*map(torch.stack, zip(*weights, strict=True)))
    jobs = [Job(0, 1, 2, 0), Job(0, 1, 1, 40), Job(1, 8, 0, 40), Job(8, 9, 1, 0)]
    for got in (
        int4_batch.multiply(int4_batch.prepared(q, token, layout), jobs, stack, 80),
        int4_batch.multiply_fp32(q.float(), jobs, stack, layout, 80),
    ):
        for start, stop, which, column in jobs:
            want = q[start:stop].double() @ values(weights[which], 100, 64).t()
            assert torch.equal(got[start:stop, column : column + 40], want.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_activations_stay_nonfinite(bad: float) -> None:
    x, weight = torch.ones(2, 64), stored(5, 64, 32, False, exponents=True)
    x[1, 3] = bad
    weight.codes.fill_(-0x66666667)  # code 1 in every nibble
    want = values(weight, 64, 32).sum(1).float()
    layout = Layout(32, False)
    for got in (
        int4_batch.multiply(int4_batch.split(x, layout), one(2), weight, 5),
        int4_batch.multiply_fp32(x, one(2), weight, layout, 5),
    ):
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=0)
        assert not torch.isfinite(got[1]).any()
