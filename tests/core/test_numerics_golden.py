"""The bit-exact contract of quantize and dequantize: golden values by hand, and an independent
implementation.
"""

from __future__ import annotations

import math

import pytest
import torch
from core_references import DTYPES, HALF, RANGE, dequantize_np, quantize_np, randn, same

from quantport import numerics
from quantport.errors import WeightError
from quantport.numerics import blocks
from quantport.numerics.scales import scale_values
from quantport.scheme import Quant
from quantport.scheme.catalog import BUILTIN

WEIGHTS = {name: scheme.weight for name, scheme in BUILTIN.items() if scheme.weight.format != "bf16"}
# one level of scales
LAYERS = {name: w for name, w in WEIGHTS.items() if not (w.zero_point or w.outer_block or w.element.block)}
QUANTS = {
    **{name: quant for name, quant in LAYERS.items() if not name.endswith(("weight_only", "w4a8"))},
    "int4_g128": WEIGHTS["int4_weight_only"],
    "fp8_1x128": Quant("e4m3fn", (1, 128)),
    "int8_per_tensor": Quant("int8", (0, 0)),
    "mxfp4:floor": BUILTIN["mxfp4:floor"].weight,
    "mxfp8:ceil": BUILTIN["mxfp8:ceil"].weight,
    "mxfp6_e3m2:even1": BUILTIN["mxfp6_e3m2:even1"].weight,
}
SHAPES = [
    (1, 1),
    (1, 7),
    (129, 1),
    (129, 7),
    (1, 129),
    (129, 129),
    (3, 704),
    (256, 256),
    (5, 128),
    (130, 260),
]


def values(codes: torch.Tensor, scale: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes and scales stand for."""
    return numerics.decode(codes, quant.element), scale_values(scale, quant.scale)


def check(x: torch.Tensor, quant: Quant) -> None:
    """Codes, scales and dequantized values equal the reference's, every element."""
    codes, scale = numerics.quantize(x, quant)
    expected, scales = quantize_np(x.float().contiguous().numpy(), quant)
    assert codes.dtype == quant.element.storage
    assert scale.dtype == quant.scale_dtype
    found = values(codes, scale, quant)
    same(found[1], scales)
    same(found[0], expected)
    same(numerics.dequantize(codes, scale, quant), dequantize_np(expected, scales, quant))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", QUANTS)
def test_equals_numpy_on_random(name, shape, dtype):
    check(randn(*shape, dtype=dtype), QUANTS[name])


@pytest.mark.parametrize("amax", [3e38, 1e30, 1.0, 2.0**-20, 1e-38, 1e-40, 1e-45], ids=str)
@pytest.mark.parametrize("name", QUANTS)
def test_equals_numpy_at_every_magnitude(name, amax):
    """Down to subnormals: 1e-45 / 448 is 0 in fp32, so the block gets 2**-23 and its codes are 0."""
    x = randn(130, 129)
    x = (x / x.abs().max()).double().mul(amax).float()
    check(x, QUANTS[name])


@pytest.mark.parametrize("name", QUANTS)
def test_zeros_get_the_smallest_scale_and_code_zero(name):
    x = torch.zeros(130, 129)
    x[1] = -0.0
    codes, scale = values(*numerics.quantize(x, QUANTS[name]), QUANTS[name])
    assert (scale == (2.0**-127 if QUANTS[name].scale == "e8m0" else 2.0**-23)).all()
    assert (codes == 0).all()


@pytest.mark.parametrize("name", QUANTS)
def test_zero_blocks_beside_others(name):
    x = randn(256, 256)
    x[:128, :128] = 0
    check(x, QUANTS[name])


def test_int8_by_hand():
    """amax 127.5, so scale = 127.5 / 127.5 = 1 and codes are the values, rounded half to even and saturated.

    0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 126.5 -> 126, 127.5 -> 128, saturates to 127; -0.5 -> 0, -1.5 -> -2, -127.5
    -> -128.
    """
    x = torch.tensor([[127.5, 0.5, 1.5, 2.5, 126.5, -0.5, -1.5, -127.5]])
    codes, scale = numerics.quantize(x, WEIGHTS["int8"])
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, 2, 126, 0, -2, -128]]
    assert numerics.dequantize(codes, scale, WEIGHTS["int8"]).tolist() == [[127, 0, 2, 2, 126, 0, -2, -128]]


def test_int4_by_hand():
    """Scales are bf16. Two groups of 32. First: amax 7.5, scale 1: 7.5 -> 8 -> 7; -7.5 -> -8; 6.5 -> 6; 0.5
    -> 0; 3.5 -> 4.

    Second: amax 15, scale 2: 15 -> 7.5 -> 8 -> 7; 1 -> 0.5 -> 0; 3 -> 1.5 -> 2; -5 -> -2.5 -> -2. A third
        group of a
    single column: amax 0.75, scale 0.75 / 7.5 = 0.1, in bf16 205 * 2**-11 = 0.10009765625, -0.75 / that =
        -7.4927 -> -7.
    """
    x = torch.zeros(1, 65)
    x[0, :5] = torch.tensor([7.5, -7.5, 6.5, 0.5, 3.5])
    x[0, 32:36] = torch.tensor([15.0, 1.0, 3.0, -5.0])
    x[0, 64] = -0.75
    codes, scale = numerics.quantize(x, WEIGHTS["int4_weight_only_g32"])
    assert scale.tolist() == [[1.0, 2.0, 205 * 2.0**-11]]
    assert codes[0, :5].tolist() == [7, -8, 6, 0, 4]
    assert codes[0, 32:36].tolist() == [7, 0, 2, -2]
    assert codes[0, 64].item() == -7


def test_bf16_is_kept_as_it_is():
    """The scheme of layers that stay: bf16 values unchanged, others rounded once."""
    for dtype in DTYPES:
        x = randn(3, 5, dtype=dtype)
        stored = numerics.quantize_weight(x, BUILTIN["bf16"])
        assert list(stored) == ["weight"]
        assert torch.equal(stored["weight"], x.bfloat16())
        assert stored["weight"].data_ptr() != x.data_ptr()
        assert torch.equal(numerics.dequantize_weight(stored, BUILTIN["bf16"], 5), x.bfloat16().float())


def test_fp8_by_hand():
    """amax 448, so scale 1 and codes are the values in e4m3fn (3 mantissa bits, smallest subnormal 2**-9).

    17 lies between 16 and 18: tie, to the even mantissa 16 (1.000). 19 lies between 18 (1.001) and 20
        (1.010): tie, to 20.
    2**-10 is half of the smallest subnormal: tie, to 0. 1.5 * 2**-9: tie between 1 and 2 steps, to 2 steps =
    2**-8. 464 would be a tie above 448, but 448 is the largest: nothing is above amax. 0.3 -> 0.3125 (1.25 *
    2**-2).
    """
    x = torch.tensor([[448.0, 17.0, 19.0, 2.0**-10, 1.5 * 2.0**-9, -448.0, 0.3, -17.0]])
    codes, scale = numerics.quantize(x, WEIGHTS["fp8_per_channel"])
    assert scale.tolist() == [[1.0]]
    assert codes.float().tolist() == [[448.0, 16.0, 20.0, 0.0, 2.0**-8, -448.0, 0.3125, -16.0]]


def test_scale_is_a_true_fp32_division():
    """amax / 448 rounded once: not amax * (1 / 448), which differs in the last bit for some values."""
    amax = torch.rand(4096, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    scale = numerics.quantize(amax, WEIGHTS["fp8_per_channel"])[1]
    exact = (amax.double() / 448).float()  # a double quotient of floats rounds to the right float
    assert torch.equal(scale, exact)
    assert not torch.equal(amax * torch.tensor(1 / 448), exact)


def test_fp8_per_block_has_one_scale_per_128x128():
    x = torch.ones(129, 257)
    x[128:] = 2.0
    x[:128, 256:] = 4.0
    _, scale = numerics.quantize(x, WEIGHTS["fp8_per_block"])
    assert torch.equal(scale, torch.tensor([[1.0, 1.0, 4.0], [2.0, 2.0, 2.0]]) / 448)


def test_fp8_per_tensor_has_one_scale():
    x = randn(7, 9)
    assert numerics.quantize(x, WEIGHTS["fp8_per_tensor"])[1].tolist() == [[(x.abs().max() / 448).item()]]


@pytest.mark.parametrize("name", QUANTS)
def test_every_tie_rounds_to_even(name):
    """x / scale exactly halfway between two codes, for every pair of neighbours."""
    quant = QUANTS[name]
    if quant.format in RANGE:
        amax = HALF[quant.format]
        ties = torch.arange(-amax, amax + 1)
    else:
        codes = numerics.values_of(quant.format)
        codes = codes[codes.isfinite()].unique()
        ties, amax = (codes[1:] + codes[:-1]) / 2, HALF[quant.format]
    x = torch.full((1, 64 * len(ties)), amax)  # every group holds amax, so that its scale is 1
    if quant.rule == "even1" or quant.rule == "ceil":  # or where 448 would make it 2: 256
        x = torch.full_like(x, 2.0 ** math.floor(math.log2(amax)))
    x[0, 1::64] = ties
    x[0, 33::64] = -ties
    check(x, quant)


@pytest.mark.parametrize("name", QUANTS)
def test_non_contiguous_input(name):
    x = randn(130, 260)
    for view in (x.t(), x[::2, ::3], x[:, 1:]):
        found, expected = (
            numerics.quantize(view, QUANTS[name]),
            numerics.quantize(view.contiguous(), QUANTS[name]),
        )
        assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(found[1], expected[1])
        assert found[0].is_contiguous()


@pytest.mark.parametrize("chunk", [1, 130, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (129, 7), (300, 129)], ids=str)
@pytest.mark.parametrize("name", QUANTS)
def test_chunks_do_not_show(name, shape, chunk, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", chunk)
    check(randn(*shape), QUANTS[name])


@pytest.mark.parametrize("name", QUANTS)
def test_input_is_left_alone(name):
    x = randn(130, 129)
    before = x.clone()
    numerics.quantize(x, QUANTS[name])
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", QUANTS)
def test_given_scale_is_used_and_saturates(name):
    x, quant = randn(130, 129), QUANTS[name]
    codes, own = numerics.quantize(x, quant)
    again, scale = numerics.quantize(x, quant, own if quant.scale == "e8m0" else own.float())
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scale, own)
    tight = numerics.decode(numerics.quantize(x * 4, quant, own)[0], quant.element)
    assert tight.min() == quant.element.low
    assert tight.max() == quant.element.high


@pytest.mark.parametrize("shape", [(0, 8), (0, 129), (8, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_zero_size(name, shape):
    """Nothing in, nothing out, in the layout of the scheme."""
    stored = numerics.quantize_weight(torch.empty(shape), BUILTIN[name])
    assert {key: (tuple(t.shape), t.dtype) for key, t in stored.items()} == BUILTIN[name].layout(*shape)
    assert numerics.dequantize_weight(stored, BUILTIN[name], shape[1]).shape == shape


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_layout(name, dtype):
    for n, k in SHAPES:
        stored = numerics.quantize_weight(randn(n, k, dtype=dtype), BUILTIN[name])
        assert {key: (tuple(t.shape), t.dtype) for key, t in stored.items()} == BUILTIN[name].layout(n, k)
        assert sum(t.nbytes for t in stored.values()) == BUILTIN[name].bytes(n, k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_weights(name, bad, dtype):
    x = randn(130, 129, dtype=dtype)
    x[129, 128] = bad
    if name in LAYERS:
        scale = scale_values(numerics.quantize(x, WEIGHTS[name])[1], WEIGHTS[name].scale)
        assert (~scale.isfinite()).sum() == 1
    with pytest.raises(WeightError, match=r"layers\.3\.q_proj"):
        numerics.quantize_weight(x, BUILTIN[name], "layers.3.q_proj")
    zeroed = x.clone()
    zeroed[129, 128] = 0
    found = numerics.quantize_weight(x, BUILTIN[name], nonfinite="zero")
    expected = numerics.quantize_weight(zeroed, BUILTIN[name])
    assert all(torch.equal(found[key].view(torch.uint8), expected[key].view(torch.uint8)) for key in expected)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 2).double()],
)
def test_wrong_rank_or_dtype_is_refused(weight):
    with pytest.raises(WeightError, match="float16"):
        numerics.quantize_weight(weight, BUILTIN["int8"])


@pytest.mark.parametrize("name", ["fp8_per_tensor", "fp8_per_block", "int8", "int4_weight_only_g32"])
def test_dequantize_rounds_once(name):
    """fp32 product, then one rounding to the asked dtype."""
    codes, scale = numerics.quantize(randn(130, 129), WEIGHTS[name])
    exact = numerics.dequantize(codes, scale, WEIGHTS[name])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(numerics.dequantize(codes, scale, WEIGHTS[name], dtype), exact.to(dtype))
