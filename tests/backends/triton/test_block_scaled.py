"""MX and NVFP4 in Triton's interpreter, with ``tl.dot_scaled`` of ``triton_emulation``, against the
reference.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
import triton_emulation

from quantport import numerics, schemes
from quantport.device import Arch, Device
from quantport.kernels.base import Request, WeightSpec
from quantport_triton.kernels.block_scaled import TritonMx, TritonNvfp4
from quantport_triton.launch import traced

KERNELS = {"mxfp8": TritonMx, "mxfp4": TritonMx, "mxfp4_w4a8": TritonMx, "nvfp4": TritonNvfp4}
OPTIONS = ("mxfp4:floor", "mxfp8:rceil", "mxfp4_w4a8:mse", "nvfp4:mse", "nvfp4:hadamard")
ROWS = (1, 2, 16, 17, 63, 128, 257)


def kernel(scheme):
    return KERNELS[scheme.partition(":")[0]]("test")


def problem(scheme, m, n, k, dtype=torch.bfloat16, seed=0):
    """Activations, stored weight and spec. Magnitudes of rows and of blocks differ, so that every scale
    matters.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10 ** torch.randn(m, k, generator=generator)
    weight = torch.randn(n, k, generator=generator) * torch.exp(torch.randn(n, k, generator=generator))
    scheme = schemes[scheme]
    return (
        x.clamp(-3e4, 3e4).to(dtype),
        numerics.quantize_weight(weight.to(dtype), scheme),
        WeightSpec(scheme, n, k),
    )


def check(x, stored, spec, bias=None):
    test = kernel(spec.scheme.name)
    y = test.apply(x, test.pack(stored, spec), bias, spec)
    expected = numerics.linear(x, stored, spec.scheme, bias)
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    if y.numel():
        error = (y.float() - expected.float()).abs().amax(1)
        assert (error <= test.tolerance * expected.float().abs().amax(1)).all(), error
    return y


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scheme", KERNELS)
def test_equals_the_reference(scheme, rows):
    check(*problem(scheme, rows, 200, 384))


@pytest.mark.parametrize("shape", [(3, 129, 333), (70, 31, 131), (130, 257, 16), (5, 1, 1)], ids=str)
@pytest.mark.parametrize("scheme", KERNELS)
def test_any_shape_with_bias_in_fp16(scheme, shape):
    m, n, k = shape
    x, stored, spec = problem(scheme, m, n, k, torch.float16)
    check(x / 64, stored, spec, torch.randn(n, dtype=torch.float16))


@pytest.mark.parametrize("rows", [5, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (40, 130))])
@pytest.mark.parametrize("target", ["sm_100", "sm_120"])
@pytest.mark.parametrize("scheme", KERNELS)
def test_with_the_tiles_of_every_architecture(scheme, target, rows):
    """With the configurations of ``tuned``; launches with real tensors run in the interpreter."""
    with traced(target):
        check(*problem(scheme, rows, 140, 1100))


@pytest.mark.parametrize("scheme", OPTIONS)
def test_options_change_what_is_stored_only(scheme):
    check(*problem(scheme, 5, 40, 256))


@pytest.mark.parametrize("scheme", KERNELS)
def test_no_rows(scheme):
    assert check(*problem(scheme, 0, 64, 128)).shape == (0, 64)


@pytest.mark.parametrize("scheme", KERNELS)
def test_split_k_gives_the_same_bits_at_every_call(scheme):
    x, stored, spec = problem(scheme, 5, 130, 4400)
    bias = torch.randn(130, dtype=torch.bfloat16)
    assert torch.equal(check(x, stored, spec, bias), check(x, stored, spec, bias))


@pytest.mark.parametrize("scheme", KERNELS)
def test_zeros_and_saturated_values(scheme):
    x, _, spec = problem(scheme, 33, 48, 256)
    x[::3] = 0
    x[1::3] = 7 * torch.sign(x[1::3])
    weight = torch.randn(48, 256)
    weight[0], weight[1], weight[2, 5] = 0, 3, 1e4
    check(x, numerics.quantize_weight(weight.bfloat16(), spec.scheme), spec)


@pytest.mark.parametrize(("of_x", "of_weight"), [(1e30, 1e-30), (1e-30, 1e28), (1e-20, 1e-10), (1e-35, 1e10)])
@pytest.mark.parametrize("scheme", KERNELS)
def test_huge_and_tiny_scales(scheme, of_x, of_weight):
    x, _, spec = problem(scheme, 3, 16, 128)
    weight = torch.randn(16, 128) * of_weight
    y = check(
        (x.float() / x.float().abs().max() * of_x).bfloat16(),
        numerics.quantize_weight(weight.bfloat16(), spec.scheme),
        spec,
    )
    assert torch.isfinite(y).all()
    assert y.abs().max() > 0


# numpy, of what is tested here
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", KERNELS)
def test_a_token_that_is_not_finite_shows_and_hurts_no_other(scheme, value):
    x, stored, spec = problem(scheme, 3, 16, 256)
    x[1, 130] = value
    test = kernel(scheme)
    y = test.run(x, test.pack(stored, spec), None, spec)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[::2], test.run(x[::2].contiguous(), test.pack(stored, spec), None, spec))


@pytest.mark.parametrize("name", [*KERNELS, *OPTIONS])
def test_serves_its_schemes_and_keeps_their_layout(name):
    assert kernel(name).serves(schemes[name])
    assert kernel(name).keeps_layout
    assert kernel(name).quantizes_activations


@pytest.mark.parametrize("name", [*(s for s in schemes if s not in KERNELS)])
def test_serves_nothing_else(name):
    assert not any(kernel(scheme).serves(schemes[name]) for scheme in KERNELS)


def test_the_emulation_by_hand():
    """One product of each format: e2m1 codes 7 and 2 are 6 and 1, e4m3 codes 0x7e and 0x38 are 448 and 1,
    e8m0 128 is 2.
    """

    class E2M1:
        name = "E2M1"

    class E4M3:
        name = "E4M3"

    class Scale:
        def __init__(self, values, dtype):
            self.data = np.array([values], dtype).view(np.uint8)

    fp4 = np.array([[0x27, *[0] * 15]], np.uint8)
    assert triton_emulation.values(fp4, Scale([128], np.uint8), E2M1)[0, :3].tolist() == [12, 2, 0]
    assert triton_emulation.values(fp4, Scale([0.5, 1], ml_dtypes.float8_e4m3fn), E2M1)[0, :3].tolist() == [
        3,
        0.5,
        0,
    ]
    fp8 = np.array([[0x7E, 0x38, *[0] * 30]], np.uint8)
    assert triton_emulation.values(fp8, Scale([126], np.uint8), E4M3)[0, :3].tolist() == [224, 0.5, 0]


def test_rows_that_are_not_aligned_are_said_to_be_slow():
    device = Device(Arch("test", "none", "nothing", frozenset(), ""))
    scheme = schemes["mxfp8"]
    slow = [
        kernel(scheme.name).slow(Request(WeightSpec(scheme, 64, k), "linear", device)) for k in (1024, 1000)
    ]
    assert slow == ["", "codes are loaded one by one: K is 1000, not a multiple of 16"]
