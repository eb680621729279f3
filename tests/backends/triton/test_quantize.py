"""Weights and activations quantized by Triton kernels are byte for byte those of the reference."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantport.backend import Quant, numerics
from quantport.numerics.scales import scale_values
from quantport.scheme.catalog import BUILTIN
from quantport_cuda.detect import CudaBackend
from quantport_triton.launch import traced
from quantport_triton.quantize import has_kernel, quantize, swizzled
from quantport_triton.weights import quantize_weight

NAMES = [*BUILTIN, *(f"{name}:{option}" for name in BUILTIN for option in BUILTIN[name].options)]
DECLINED = {
    name
    for name in NAMES
    if BUILTIN[name].weight.element.block or ":double" in name or "hqq" in name or name == "bf16"
}
WEIGHTS = [name for name in NAMES if name not in DECLINED]
ACTIVATIONS = {
    quant: f"{quant}, {quant.scale} {quant.rule}" for name in NAMES if (quant := BUILTIN[name].activation)
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPECIAL = [float("inf"), float("-inf"), float("nan")]


def matrix(n, k, dtype):
    """Rows from subnormal to huge values, one of zeros, and one outlier."""
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    span = 8 if dtype is torch.float16 else 100
    x *= torch.exp2(torch.linspace(-span, span, n) if n > 1 else torch.zeros(1)).round()[:, None]
    x[n // 2] = 0
    x[n // 2, ::3] = -0.0
    x[-1, k // 2] *= 50
    return x.to(dtype)


def same(got, want, name=""):
    assert got.dtype is want.dtype, name
    assert got.shape == want.shape, name
    assert torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (got, want))), name


def unchecked(weight, scheme):
    """The reference without its refusal of scales that are not finite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("quantport.numerics.linear"), "check_finite", lambda *_: None)
        return numerics.quantize_weight(weight, scheme)


def check_weight(weight, scheme):
    want, got = unchecked(weight, scheme), quantize_weight(weight, scheme)
    assert list(got) == list(want)
    finite = [scale_values(stored["weight_scale"], scheme.weight.scale).isfinite() for stored in (got, want)]
    assert torch.equal(*finite)
    if finite[1].all():  # otherwise codes and offsets mean nothing
        for name in want:
            same(got[name], want[name], name)


def reference(x, quant):
    blocks = numerics.quantize_blocks(x, quant)
    packed = blocks.codes if quant.element.bits == 8 else numerics.pack_bits(blocks.codes, quant.element.bits)
    return packed, blocks.scale, blocks.outer


def check_activations(x, quant):
    for got, want in zip(quantize(x, quant), reference(x, quant), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            same(got, want)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "hadamard" not in name])
def test_weights(name):
    check_weight(matrix(5, 1056, torch.bfloat16), BUILTIN[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in WEIGHTS if ":" not in name or "mse" in name])
def test_dtypes_of_weights(name, dtype):
    check_weight(matrix(3, 77, dtype), BUILTIN[name])


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "hadamard" in name])
def test_rotated_weights(name):
    weight = torch.randn(3, 96).bfloat16()
    got = numerics.quantize_weight(weight, BUILTIN[name], fast=quantize_weight)
    for tensor, want in zip(
        got.values(), numerics.quantize_weight(weight, BUILTIN[name]).values(), strict=True
    ):
        same(tensor, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", ACTIVATIONS, ids=ACTIVATIONS.values())
def test_activations(quant, dtype):
    check_activations(matrix(5, 608, dtype), quant)
    check_activations(matrix(2, 77, dtype), quant)


def test_the_global_factor_is_rounded_once():
    """Largest magnitudes of which ``2688 * (1 / amax)`` is another number than ``2688 / amax``."""
    tops = (1 + torch.arange(128, dtype=torch.float32) / 128).bfloat16()
    apart = tops[(2688 / tops.double()).float() != tops.float().reciprocal() * 2688]
    assert len(apart) > 5
    x = apart[:, None] * torch.linspace(-1, 1, 32)
    check_activations(x.bfloat16(), BUILTIN["nvfp4"].activation)
    for row in x.bfloat16()[:3]:
        check_weight(row[None], BUILTIN["nvfp4"])


@pytest.mark.parametrize("shape", [(1, 1), (66, 1), (33, 8), (1, 5376)])
@pytest.mark.parametrize(
    "name", ["fp8_per_tensor", "int8", "fp8_per_block", "int4_weight_only", "fp6", "nvfp4", "nf4", "int4_mse"]
)
def test_shapes_of_weights(name, shape):
    check_weight(matrix(*shape, torch.bfloat16), BUILTIN[name])


@pytest.mark.parametrize(
    "quant",
    [
        Quant("int8", (0, 0)),
        Quant("e4m3fn", (0, 0)),
        Quant("e4m3fn", (1, 48)),
        Quant("int8", (1, 1)),
        Quant("e3m2", (1, 0)),
        Quant("e4m3fn", (3, 40)),
        Quant("e2m1", (1, 6)),
        Quant("int8", (1, 0), "bf16"),
        Quant("e2m1", (1, 16), "e4m3fn"),
        Quant("e2m1", (1, 0)),
    ],
    ids=str,
)
def test_other_blocks(quant):
    assert has_kernel(quant)
    check_activations(matrix(7, 203, torch.bfloat16), quant)


@pytest.mark.parametrize(
    "quant", [Quant("e2m1", (1, 7)), Quant("e4m3fn", (0, 32)), Quant("e4m3fn", (256, 256))], ids=str
)
def test_what_has_no_kernel_is_quantized_by_the_reference(quant):
    assert not has_kernel(quant)
    check_activations(matrix(7, 203, torch.bfloat16), quant)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_rows_that_do_not_fit_into_registers(name):
    check_activations(matrix(2, 16384 + 96, torch.bfloat16), BUILTIN[name].activation)


@pytest.mark.parametrize("name", ["fp8", "fp8_per_block", "mxfp4", "nvfp4", "mxfp4_dualscale"])
def test_rows_with_gaps_and_columns(name):
    x = matrix(6, 256, torch.bfloat16)
    check_activations(x[:, 32:160], BUILTIN[name].activation)
    check_activations(x[:, 30:70].t(), BUILTIN[name].activation)
    check_weight(x[::2, :96], BUILTIN[name])


@pytest.mark.parametrize("shape", [(3, 77), (130, 80), (64, 96)])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_swizzled_scales(name, shape):
    x, quant = matrix(*shape, torch.bfloat16), BUILTIN[name].activation
    codes, scale, _ = quantize(x, quant, swizzle=True)
    packed, plain, _ = reference(x, quant)
    same(codes, packed)
    same(scale, swizzled(plain))
    rows, columns = scale.shape
    assert (rows % 128, columns % 4) == (0, 0)
    flat, byte = scale.view(torch.uint8).flatten(), plain.view(torch.uint8)
    for r, c in [(0, 0), (2, 1), (shape[0] - 1, plain.shape[1] - 1)]:
        place = (r // 128 * (columns // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        assert flat[place] == byte[r, c]


def test_scales_by_columns():
    x, quant = matrix(9, 300, torch.bfloat16), BUILTIN["fp8_per_block"].activation
    scale = quantize(x, quant, transposed=True).scale
    assert scale.stride() == (1, 9)
    same(scale, quantize(x, quant).scale)


@pytest.mark.parametrize("name", sorted(DECLINED))
def test_declined(name):
    assert quantize_weight(torch.ones(4, 512), BUILTIN[name]) is None


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_empty(shape):
    assert quantize_weight(torch.ones(shape), BUILTIN["int8"]) is None
    check_activations(torch.ones(shape), BUILTIN["fp8"].activation)


def test_odd_groups_of_int4_are_declined():
    quant = replace(BUILTIN["int4_weight_only"].weight, block_shape=(1, 12))
    assert quantize_weight(torch.ones(2, 24), replace(BUILTIN["int4_weight_only"], weight=quant)) is None


@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("name", [name for name in WEIGHTS if ":" not in name or "mse" in name])
def test_nan_and_inf_show_in_the_scales(name, value):
    weight = torch.randn(4, 192).bfloat16()
    weight[2, 70] = value
    scheme = BUILTIN[name]
    check_weight(weight, scheme)
    assert (
        not scale_values(quantize_weight(weight, scheme)["weight_scale"], scheme.weight.scale)
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize(
    "name", ["fp8", "int8", "fp8_per_block", "mxfp8", "mxfp4", "nvfp4", "mxfp4_dualscale"]
)
def test_nan_and_inf_of_a_token_stay_there(name, value):
    x, quant = torch.randn(3, 192).bfloat16(), BUILTIN[name].activation
    clean = quantize(x, quant)
    x[1, 70] = value
    got = quantize(x, quant)
    for tensor, want in zip(got, clean, strict=True):
        if want is not None:
            same(tensor[[0, 2]], want[[0, 2]])
    spread = [scale_values(got.scale, quant.scale), *([] if got.outer is None else [got.outer])]
    assert any(not factor[1].isfinite().all() for factor in spread)


@pytest.mark.parametrize("name", [*WEIGHTS, *sorted(DECLINED)])
def test_the_cuda_room_quantizes_what_it_can(name):
    scheme = BUILTIN[name]
    with FakeTensorMode(), traced("sm_80") as launches:
        got = CudaBackend().quantize_weight(torch.empty(48, 608, dtype=torch.bfloat16, device="cuda"), scheme)
    assert (got is None) == (name in DECLINED)
    if got is not None:
        assert {key: (tuple(t.shape), t.dtype) for key, t in got.items()} == scheme.layout(48, 608)
        assert launches
        assert not any(made.fusion for made in launches)


def test_the_cuda_room_leaves_weights_of_other_devices_alone():
    assert CudaBackend().quantize_weight(torch.ones(4, 64), BUILTIN["int8"]) is None
