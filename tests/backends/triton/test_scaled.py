"""W8A8 and W4A8 in Triton's interpreter, against the reference."""

import pytest
import torch

from quantport import numerics, schemes
from quantport.device import Arch, Device
from quantport.kernels.base import Request, WeightSpec
from quantport_triton.kernels import scaled
from quantport_triton.kernels.scaled import TritonFp8, TritonFp8Block, TritonInt4Int8, TritonInt8
from quantport_triton.launch import traced
from quantport_triton.quantize import quantize

KERNELS = {
    "fp8_per_tensor": TritonFp8,
    "fp8_per_channel": TritonFp8,
    "fp8_per_block": TritonFp8Block,
    "int8": TritonInt8,
    "int4_w4a8": TritonInt4Int8,
}
ROWS = (1, 2, 16, 17, 63, 128, 257)


def kernel(scheme):
    return KERNELS[scheme]("test")


def problem(scheme, m, n, k, dtype=torch.bfloat16, seed=0):
    """Activations, stored weight and spec."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    scheme = schemes[scheme]
    return x, numerics.quantize_weight(weight.to(dtype), scheme), WeightSpec(scheme, n, k)


def check(x, stored, spec, bias=None):
    test = kernel(spec.scheme.name)
    y = test.run(x, test.pack(stored, spec), bias, spec)
    expected = numerics.linear(x, stored, spec.scheme, bias)
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    error = (y.float() - expected.float()).abs().max() if y.numel() else 0
    assert error <= test.tolerance * (expected.float().abs().max() if y.numel() else 1), error
    return y


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scheme", KERNELS)
def test_equals_the_reference(scheme, rows):
    x, stored, spec = problem(scheme, rows, 200, 384)
    check(x, stored, spec)


@pytest.mark.parametrize("shape", [(3, 129, 333), (70, 31, 131), (130, 257, 16), (5, 1, 1)], ids=str)
@pytest.mark.parametrize("scheme", KERNELS)
def test_any_shape_with_bias_in_fp16(scheme, shape):
    m, n, k = shape
    x, stored, spec = problem(scheme, m, n, k, torch.float16)
    check(x, stored, spec, torch.randn(n, dtype=torch.float16))


@pytest.mark.parametrize("rows", [5, pytest.param(130, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "target",
    ["sm_80", "sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_89", "sm_100", "sm_120"))],
)
@pytest.mark.parametrize("scheme", KERNELS)
def test_with_the_tiles_of_every_architecture(scheme, target, rows):
    """With the configurations of ``tuned``; launches with real tensors run in the interpreter."""
    with traced(target):
        check(*problem(scheme, rows, 140, 1100))


@pytest.mark.parametrize("scheme", KERNELS)
def test_no_rows(scheme):
    x, stored, spec = problem(scheme, 0, 64, 128)
    assert check(x, stored, spec).shape == (0, 64)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("scheme", KERNELS)
def test_split_k_gives_the_same_bits_at_every_call(scheme, rows):
    x, stored, spec = problem(scheme, rows, 65, 2200)
    bias = torch.randn(65, dtype=torch.bfloat16)
    assert torch.equal(check(x, stored, spec, bias), check(x, stored, spec, bias))


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("scheme", KERNELS)
def test_zeros_and_saturated_values(scheme, rows):
    """Rows of zeros, rows of only the largest value, and an outlier that leaves small codes to the rest."""
    x, _, spec = problem(scheme, rows, 48, 256)
    x[::3] = 0
    x[1::3] = 7 * torch.sign(x[1::3])
    weight = torch.randn(48, 256)
    weight[0], weight[1], weight[2, 5] = 0, 3, 1e4
    check(x, numerics.quantize_weight(weight.bfloat16(), spec.scheme), spec)


@pytest.mark.parametrize(("of_x", "of_weight"), [(1e30, 1e-30), (1e-30, 1e28), (1e-20, 1e-10), (3e37, 1e-6)])
@pytest.mark.parametrize("scheme", KERNELS)
def test_huge_and_tiny_scales(scheme, of_x, of_weight):
    x, _, spec = problem(scheme, 3, 16, 128)
    weight = torch.randn(16, 128) * of_weight
    y = check(x * of_x, numerics.quantize_weight(weight.bfloat16(), spec.scheme), spec)
    assert torch.isfinite(y).all()
    assert y.abs().max() > 0


def test_scales_of_groups_in_any_order_in_memory(monkeypatch):
    monkeypatch.setattr(
        scaled, "quantize", lambda x, quant, transposed: quantize(x, quant, transposed=not transposed)
    )
    for rows in (3, 70):
        check(*problem("fp8_per_block", rows, 40, 640))


@pytest.mark.parametrize("rows", [2, 65])
@pytest.mark.parametrize("scheme", KERNELS)
def test_every_token_has_a_scale_of_its_own(scheme, rows):
    """The error of each token is small relative to its own magnitude, also beside larger tokens."""
    x, stored, spec = problem(scheme, rows, 40, 256)
    size = 10.0 ** (torch.arange(rows) % 7 - 3)[:, None]
    test = kernel(scheme)
    y = test.run((x * size).bfloat16(), test.pack(stored, spec), None, spec).float()
    expected = numerics.linear((x * size).bfloat16(), stored, spec.scheme).float()
    assert ((y - expected).abs().amax(1) <= test.tolerance * expected.abs().amax(1)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of what is tested here
@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_shows_and_hurts_no_other(scheme, value):
    x, stored, spec = problem(scheme, 3, 16, 256)
    x[1, 130] = value
    test = kernel(scheme)
    y = test.run(x, test.pack(stored, spec), None, spec)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[::2], test.run(x[::2].contiguous(), test.pack(stored, spec), None, spec))


def test_int8_sums_are_exact():
    """Partial sums far beyond 2**24, which fp32 would round, cancel except for one code."""
    spec = WeightSpec(schemes["int8"], 1, 8193)
    half = 101 + torch.arange(4096, dtype=torch.int32).mul(7).remainder(27).to(torch.int8)
    codes = torch.cat((half, -half, torch.ones(1, dtype=torch.int8)))[None]
    # half of the span: the scale is 1, the codes are 127
    x = torch.full((1, 8193), 127.5, dtype=torch.bfloat16)
    assert kernel("int8").run(x, (codes, torch.ones(1, 1)), None, spec).item() == 127


@pytest.mark.parametrize("scheme", [s for s in schemes if s not in KERNELS])
def test_serves_nothing_else(scheme):
    assert not any(kernel(name).serves(schemes[scheme]) for name in KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_serves_its_scheme_and_keeps_its_layout(name):
    assert kernel(name).serves(schemes[name])
    assert kernel(name).keeps_layout
    assert kernel(name).quantizes_activations


def test_rows_that_are_not_aligned_are_said_to_be_slow():
    device = Device(Arch("test", "none", "nothing", frozenset(), ""))
    scheme = schemes["int4_w4a8"]
    slow = [
        kernel(scheme.name).slow(Request(WeightSpec(scheme, 64, k), "linear", device)) for k in (1024, 1000)
    ]
    assert slow == ["", "codes are loaded one by one: K is 1000, not a multiple of 32"]
