"""MX scale rules and codes against torchao's emulation (``to_mx``), and NVFP4 against its ``nvfp4_quantize``.

Named differences, each with a test. torchao divides by no scale below 2**-126, and ``rceil`` by 1 where the
exponent is 0: here the stored scale is always the divisor. ``rceil`` takes the logarithm in floating point,
which rounds down to a power of two just below it: here the smallest power of two that saturates nothing. An
infinite amax gives NaN here, 254 or 255 there. NVFP4: no block scale below 2**-6 there, subnormals here; it
multiplies by a reciprocal, here is a true division.
"""

from __future__ import annotations

import pytest
import torch
from core_peers import normal, patterns, peer
from torch import Tensor

from quantport import numerics
from quantport.numerics.blocks import quantize_blocks
from quantport.numerics.scales import e8m0_of
from quantport.scheme import Quant
from quantport.scheme.catalog import BUILTIN
from quantport.scheme.formats import E2M1, E8M0

RULES = ("floor", "even", "ceil", "rceil")
FORMATS = ("e4m3fn", "e5m2", "e2m3", "e3m2", "e2m1")


def torchao(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    """Scale bytes and codes of torchao."""
    module, constants = (
        peer("torchao.prototype.mx_formats.mx_tensor"),
        peer("torchao.prototype.mx_formats.constants"),
    )
    mode = peer("torchao.prototype.mx_formats.config").ScaleCalculationMode[rule.upper()]
    dtype = {
        "e4m3fn": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e2m3": constants.DTYPE_FP6_E2M3,
        "e3m2": constants.DTYPE_FP6_E3M2,
        "e2m1": torch.float4_e2m1fn_x2,
    }[form]
    scale, codes = module.to_mx(x, dtype, 32, mode)
    codes = codes.view(torch.uint8).reshape(x.shape[0], -1)
    return scale.view(torch.uint8), numerics.unpack_bits(codes, x.shape[1], 4) if form == "e2m1" else codes


def ours(x: Tensor, form: str, rule: str) -> tuple[Tensor, Tensor]:
    codes, scale = numerics.quantize(x, Quant(form, (1, 32), "e8m0", rule))
    return scale, codes.view(torch.uint8)


def logarithm_rounds_down(x: Tensor, form: str) -> Tensor:
    """Blocks whose amax / max is just above a power of two, so that log2 in fp32 gives the integer below."""
    ratio = x.view(x.shape[0], -1, 32).abs().amax(-1) / Quant(form, (1, 32)).element.high
    exact = torch.frexp(ratio)
    log = ratio.log2()
    return (log == log.round()) & (exact.mantissa != 0.5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMATS)
def test_codes_and_scales_of_a_million_weights(form, rule):
    x = torch.cat([normal(512, 512, spread=spread) for spread in (0.0, 1.0, 4.0, 8.0)])
    for values in (x, x.bfloat16()):
        found, expected = ours(values, form, rule), torchao(values, form, rule)
        same = (
            ~logarithm_rounds_down(values.float(), form)
            if rule == "rceil"
            else torch.ones_like(found[0], dtype=torch.bool)
        )
        assert same.float().mean() > 0.999
        assert torch.equal(found[0][same], expected[0][same])
        wide = same.repeat_interleave(32, 1)
        assert torch.equal(found[1][wide], expected[1][wide])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMATS)
def test_codes_and_scales_of_a_million_bit_patterns(form, rule):
    """All magnitudes: where the biased exponent is in 2..253 both agree, but for the named differences."""
    x = patterns(1 << 20).nan_to_num(0, 0, 0).view(1024, 1024)
    # every amax down to subnormals
    x = torch.ldexp(x, -((torch.arange(1024)[:, None] + torch.zeros(1, 1024)) % 250).int())
    x[x.abs() > 1.6e38] = 0.0
    found, expected = ours(x, form, rule), torchao(x, form, rule)
    same = (found[0] > 1) & (found[0] < 254)
    if rule == "rceil":
        same &= ~logarithm_rounds_down(x, form)
    assert same.float().mean() > 0.5
    assert torch.equal(found[0][same], expected[0][same])
    wide = same.repeat_interleave(32, 1)
    assert torch.equal(found[1][wide], expected[1][wide])
    if rule != "rceil":
        assert torch.equal(found[0], expected[0]), (
            "scales agree everywhere; only the divisor differs below 2**-126"
        )


# hardware facts: block = amax, -amax / 3, 0...; (unbiased exponent, first value or byte) by rule floor, ceil,
# even, rceil
VECTORS_E4M3 = {
    1.0: ((-8, 256), (-8, 256), (-8, 256), (-8, 256)),
    1.5: ((-8, 384), (-7, 192), (-8, 384), (-8, 384)),
    1.75: ((-8, 448), (-7, 224), (-8, 448), (-8, 448)),
    1.875: ((-8, 448), (-7, 240), (-8, 448), (-7, 240)),
    1.99: ((-8, 448), (-7, 256), (-7, 256), (-7, 256)),
    6.0: ((-6, 384), (-5, 192), (-6, 384), (-6, 384)),
    480.0: ((0, 448), (1, 240), (0, 448), (1, 240)),
    0.0: ((-127, 0), (-127, 0), (-127, 0), (-127, 0)),
}
VECTORS_E2M1 = {
    1.0: ((-2, 0xB6), (-2, 0xB6), (-2, 0xB6), (-2, 0xB6)),
    1.5: ((-2, 0xC7), (-1, 0xA5), (-2, 0xC7), (-2, 0xC7)),
    1.75: ((-2, 0xC7), (-1, 0xA6), (-1, 0xA6), (-1, 0xA6)),
    1.875: ((-2, 0xC7), (-1, 0xA6), (-1, 0xA6), (-1, 0xA6)),
    1.99: ((-2, 0xD7), (-1, 0xB6), (-1, 0xB6), (-1, 0xB6)),
    6.0: ((0, 0xC7), (1, 0xA5), (0, 0xC7), (0, 0xC7)),
    480.0: ((6, 0xC7), (7, 0xA6), (7, 0xA6), (7, 0xA6)),
    0.0: ((-127, 0x80), (-127, 0x80), (-127, 0x80), (-127, 0x80)),
}


@pytest.mark.parametrize("index", range(4), ids=("floor", "ceil", "even", "rceil"))
def test_vectors(index):
    rule = ("floor", "ceil", "even", "rceil")[index]
    for form, vectors in (("e4m3fn", VECTORS_E4M3), ("e2m1", VECTORS_E2M1)):
        for amax, wanted in vectors.items():
            x = torch.zeros(1, 32)
            x[0, 0], x[0, 1] = amax, -amax / 3
            scale, codes = ours(x, form, rule)
            first = (
                numerics.pack_bits(codes, 4)[0, 0].item()
                if form == "e2m1"
                else codes.view(torch.float8_e4m3fn)[0, 0].item()
            )
            assert (scale.item() - 127, first) == wanted[index], (form, amax)


def test_even1_is_even_with_one_bit():
    """e4m3fn under ``even1`` (compressed-tensors) takes the next power from 1.75 on, under ``even`` from
    1.9375 on.
    """
    amax = torch.tensor([1.0, 1.7499999, 1.75, 1.9374999, 1.9375, 1.99])
    e4m3 = BUILTIN["mxfp8"].weight.element
    assert (e8m0_of(amax, e4m3, "even1").int() - 119).tolist() == [0, 0, 1, 1, 1, 1]
    assert (e8m0_of(amax, e4m3, "even").int() - 119).tolist() == [0, 0, 0, 0, 1, 1]
    assert torch.equal(e8m0_of(amax, E2M1, "even1"), e8m0_of(amax, E2M1, "even"))


def test_named_difference_of_the_smallest_scales():
    """amax 2**-125: the scale is 2**-127. torchao stores it but divides by 2**-126; under ``rceil`` it
    divides by 1.
    """
    x = torch.full((1, 32), 2.0**-125)
    for rule in RULES:
        scale, codes = ours(x, "e2m1", rule)
        theirs = torchao(x, "e2m1", rule)
        assert scale.item() == theirs[0].item() == 0
        assert (codes == 6).all(), "4 * 2**-127: the weight exactly"
        assert (theirs[1] == (0 if rule == "rceil" else 4)).all(), "half of it, or nothing"


def test_named_difference_of_a_logarithm():
    """amax / 6 just above 1024: the scale has to be 2048. torchao's log2 gives 10, and the value
    saturates.
    """
    x = torch.zeros(1, 32)
    x[0, 0] = torch.nextafter(torch.tensor(6144.0), torch.tensor(1e9))
    assert ours(x, "e2m1", "rceil")[0].item() == 127 + 11
    assert torchao(x, "e2m1", "rceil")[0].item() == 127 + 10


@pytest.mark.parametrize("rule", RULES)
def test_named_difference_of_infinity(rule):
    """NaN gives NaN on both sides; Inf is NaN here, and a number there under ``rceil``."""
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    assert ours(x, "e4m3fn", rule)[0].flatten().tolist() == [255, 255]
    assert numerics.decode(torch.tensor([255], dtype=torch.uint8), E8M0).isnan().all()
    theirs = torchao(x, "e4m3fn", rule)[0].flatten().tolist()
    assert theirs[0] == 255
    assert (theirs[1] == 254) == (rule == "rceil")


def nvfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    module = peer("torchao.prototype.mx_formats.nvfp4_tensor")
    scale, packed = module.nvfp4_quantize(x, 16, module.per_tensor_amax_to_scale(x.abs().amax()))
    return scale, numerics.unpack_bits(packed.view(torch.uint8).reshape(x.shape[0], -1), x.shape[1], 4)


def test_nvfp4_vector():
    """A golden row; both sides."""
    row = [1, -0.3, 0.02, 0.6, 0, 0.25, -1, 0.125, *[0.05] * 8, 8, -7.9, 3.3, 0.1, *[0.01] * 12]
    x = torch.tensor([row])
    stored = numerics.quantize_weight(x, BUILTIN["nvfp4"])
    assert stored["weight_packed"].numpy().tobytes().hex() == "c760302f11111111f704000000000000"
    assert stored["weight_scale"].float().tolist() == [[56.0, 448.0]]
    assert abs(1 / stored["weight_global_scale"].item() - 0.00297619) < 1e-8
    scale, codes = nvfp4(x)
    assert torch.equal(scale.float(), stored["weight_scale"].float())
    assert torch.equal(numerics.pack_bits(codes, 4), stored["weight_packed"])


def test_nvfp4_on_a_million_weights():
    """Equal but for a rounding in the last bit: torchao's reciprocals move few scales and codes, each by one
    step.
    """
    x = normal(1024, 1024, spread=0.5)
    blocks = quantize_blocks(x, BUILTIN["nvfp4"].weight)
    scale, codes = nvfp4(x)
    moved = blocks.scale.view(torch.uint8).int() - scale.view(torch.uint8).int()
    assert (moved != 0).float().mean() < 1e-4
    assert moved.abs().max() <= 1
    same = (moved == 0).repeat_interleave(16, 1)
    steps = ((blocks.codes.int() & 7) - (codes.int() & 7))[same]
    assert (steps != 0).float().mean() < 1e-5
    assert steps.abs().max() <= 1


def test_named_difference_of_small_nvfp4_blocks():
    """A block 2**-16 below the largest: the scale here is subnormal (down to 2**-9), there 2**-6, which loses
    its values.
    """
    x = torch.full((1, 32), 6.0)
    x[0, 16:] = 6 * 2.0**-16
    stored = numerics.quantize_weight(x, BUILTIN["nvfp4"])
    assert stored["weight_scale"].float().tolist() == [[448.0, 2.0**-7]], (
        "448 * 2**-16, which is a subnormal of e4m3fn, rounded"
    )
    scale, codes = nvfp4(x)
    assert scale[0, 1].item() == 2.0**-6
    assert codes[0, 16].item() < 7
