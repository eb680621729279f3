"""int8 activations times int8 weights by AMX tiles, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantport import numerics
from quantport.scheme import Quant
from quantport_cpu import jit

UNAVAILABLE = jit.why_unavailable()
if not UNAVAILABLE:
    from quantport_cpu.jit import amx_batch, gemm_amx
    from quantport_cpu.jit.jobs import Job

    if not gemm_amx.is_usable():
        UNAVAILABLE = "no AMX-INT8 that this process may use"
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "AMX is here")


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def expected(x: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
    q, token = numerics.quantize(x, Quant("int8", (1, 0)))
    return (q.double() @ weight.double().t()).float() * token * channel.t()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [1, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("shape", [(16, 64), (48, 192), (96, 4096), (32, 1 << 16)], ids=str)
def test_products_are_exact(shape: tuple[int, int], m: int, dtype: torch.dtype) -> None:
    x, weight, channel = torch.randn(m, shape[1]).to(dtype), codes(*shape), torch.rand(shape[0], 1) + 0.1
    for scales in (channel, channel[:1]):
        got = amx_batch.int8_int8(x, [Job(0, m, 0, 0)], weight, scales, shape[0])
        assert torch.equal(got, expected(x, weight, scales))


def test_no_sum_overflows() -> None:
    x = torch.full((16, gemm_amx.MAX_COLUMNS), -1.0).bfloat16()
    weight = torch.full((16, gemm_amx.MAX_COLUMNS), -128, dtype=torch.int8)
    one = torch.ones(1, 1)
    got = amx_batch.int8_int8(x, [Job(0, 16, 0, 0)], weight, one, 16)
    assert torch.equal(got, expected(x, weight, one))
    assert (got > 0).all()


def test_rows_and_columns_of_a_group_and_no_others() -> None:
    x, weights = torch.randn(40, 128).bfloat16(), [codes(48, 128) for _ in range(3)]
    channels = [torch.rand(48, 1) for _ in weights]
    jobs = [Job(0, 5, 2, 0), Job(0, 5, 1, 48), Job(5, 38, 0, 48), Job(38, 40, 1, 0)]
    got = amx_batch.int8_int8(x, jobs, torch.stack(weights), torch.stack(channels), 96)
    for start, stop, weight, column in jobs:
        want = expected(x[start:stop], weights[weight], channels[weight])
        assert torch.equal(got[start:stop, column : column + 48], want)


def test_rows_of_a_wider_matrix() -> None:
    whole = torch.randn(20, 256).bfloat16()
    x, weight, one = whole[:, 64:192], codes(32, 128), torch.ones(1, 1)
    got = amx_batch.int8_int8(x, [Job(0, 20, 0, 0)], weight, one, 32)
    assert torch.equal(got, expected(x, weight, one))


def test_onednn_finds_its_tiles_as_it_left_them() -> None:
    """Both set tiles up for themselves, on the same threads."""
    x, weight, one = torch.randn(64, 512).bfloat16(), codes(512, 512), torch.ones(1, 1)
    square = torch.randn(512, 512).bfloat16()
    before = [x @ square, torch._int_mm(weight, weight)]
    for _ in range(3):
        assert torch.equal(
            amx_batch.int8_int8(x, [Job(0, 64, 0, 0)], weight, one, 512), expected(x, weight, one)
        )
        assert torch.equal(x @ square, before[0])
        assert torch.equal(torch._int_mm(weight, weight), before[1])


@pytest.mark.parametrize(
    ("rows", "shape", "is_taken"),
    [
        (64, (32, 128), True),
        (1, (32, 128), False),
        (64, (33, 128), False),
        (64, (32, 100), False),
        (64, (32, 2 * (1 << 16)), False),
    ],
)
def test_what_tiles_take(rows: int, shape: tuple[int, int], is_taken: bool) -> None:
    weight = torch.empty(shape, dtype=torch.int8, device="meta")
    assert amx_batch.takes([Job(0, rows, 0, 0)], weight) is is_taken


def test_fake_tensors_are_not_touched() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight, one = torch.randn(64, 128).bfloat16(), codes(32, 128), torch.ones(1, 1)
        assert amx_batch.int8_int8(x, [Job(0, 64, 0, 0)], weight, one, 32).shape == (64, 32)
