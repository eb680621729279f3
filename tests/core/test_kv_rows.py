"""Rows of the KV cache: golden bytes by hand, and what holds for every input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantport import numerics
from quantport.errors import ConfigError
from quantport.kvcache import cache_dtype, decode, encode

SOME = settings(max_examples=60, deadline=None)
QUANTIZED = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
dtypes = st.sampled_from([cache_dtype(name) for name in QUANTIZED])
floats = st.floats(-3.0000000054977558e38, 3.0000000054977558e38, width=32)
rows = hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=floats).map(
    torch.from_numpy
)
# of the value; of the scale, for subnormals
half_ulp = {
    "fp8_e4m3": (2.0**-4, 2.0**-10),
    "fp8_e5m2": (2.0**-3, 2.0**-17),
}

# By hand. The scale is 1, bfloat16 0x3f80, and stands behind the codes with its low byte first. e4m3: bias 7,
# 3 bits of mantissa,
# 17 lies between 16 and 18 and goes to the even mantissa; e5m2: bias 15, 2 bits, 9 goes to 8; int8: 0.5 to 0,
# 1.5 to 2, 127.5 to
# 128, which saturates; int4: code + 8 in nibbles, low first, and an odd head ends with an empty nibble.
GOLDEN = [
    ("fp8", [448, 1, -0.0625, 17], "7e 38 98 58 80 3f", [448, 1, -0.0625, 16]),
    ("fp8_e5m2", [57344, 1, 9, -3], "7b 3c 48 c2 80 3f", [57344, 1, 8, -3]),
    ("int8", [127.5, 0.5, 1.5, -127.5], "7f 00 02 80 80 3f", [127, 0, 2, -128]),
    ("int4", [7.5, -7.5, 0.5, 1.5, 2.5], "0f a8 0a 80 3f", [7, -8, 0, 2, 2]),
    # 1.003 rounds to a scale of 1 before the codes are computed
    (
        "fp8",
        [449.344, 224],
        "7e 76 80 3f",
        [448, 224],
    ),
    ("int8", [0, 0, 0], "00 00 00 00 34", [0, 0, 0]),  # a zero row: scale 2**-23
    ("auto", [1.0, -2.0], "80 3f 00 c0", [1, -2]),
]


@pytest.mark.parametrize(("name", "values", "stored", "read"), GOLDEN)
def test_golden(name, values, stored, read):
    dtype = cache_dtype(name)
    x = torch.tensor([values], dtype=torch.bfloat16 if name == "auto" else torch.float32)
    found = encode(x, dtype)
    assert bytes(found[0].tolist()).hex(" ") == stored
    assert decode(found, x.shape[1], dtype, x.dtype)[0].tolist() == read


@SOME
@given(rows, dtypes)
def test_error_is_at_most_half_a_step(x, dtype):
    """Half a step of the format, and what rounding the scale to 8 bits clips at the top (more among subnormal
    scales).
    """
    found = decode(encode(x, dtype), x.shape[1], dtype, torch.float32).double()
    amax = x.abs().amax(1, keepdim=True).double()
    scale = amax / dtype.quant.element.half_range
    relative, absolute = half_ulp.get(dtype.name, (0, 0.5))
    bound = torch.maximum(x.double().abs() * relative, scale * absolute) + amax * 2.0**-8 + 448 * 2.0**-132
    assert ((found - x.double()).abs() <= bound).all()


@SOME
@given(rows, dtypes)
def test_it_is_the_arithmetic_of_the_house(x, dtype):
    codes, scale = numerics.quantize(x, dtype.quant)
    expected = numerics.dequantize(codes, scale, dtype.quant)
    assert torch.equal(decode(encode(x, dtype), x.shape[1], dtype, torch.float32), expected)
    assert torch.equal(decode(encode(x, dtype), x.shape[1], dtype, torch.bfloat16), expected.bfloat16()), (
        "rounded once"
    )


@SOME
@given(rows, dtypes)
def test_a_row_knows_no_other_row(x, dtype):
    together = encode(x, dtype)
    assert torch.equal(together, torch.cat([encode(row[None], dtype) for row in x]))
    assert together.shape == (x.shape[0], dtype.row_bytes(x.shape[1]))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_show_in_their_row_and_nowhere_else(name, bad):
    dtype = cache_dtype(name)
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    clean = decode(encode(x, dtype), 16, dtype, x.dtype)
    x[1, 2, 3, 5] = bad
    found = decode(encode(x, dtype), 16, dtype, x.dtype)
    assert found[1, 2, 3].isnan().all()
    clean[1, 2, 3] = found[1, 2, 3] = 0
    assert torch.equal(found, clean)


@pytest.mark.parametrize(
    ("name", "bits"), [("fp8", 8), ("fp8_e5m2", 8), ("int8", 8), ("int4", 4), ("auto", 16)]
)
def test_bytes_of_a_row(name, bits):
    scale = 0 if name == "auto" else 2
    assert [cache_dtype(name).row_bytes(w) for w in (128, 7)] == [
        128 * bits // 8 + scale,
        -(-7 * bits // 8) + scale,
    ]


def test_errors_per_format():
    """Relative error of Gaussian heads: close to what the formats can do, in the order of their bits."""
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    error = {}
    for name in QUANTIZED:
        dtype = cache_dtype(name)
        error[name] = ((decode(encode(x, dtype), 128, dtype, x.dtype) - x).norm() / x.norm()).item()
    limits = {"fp8_e4m3": 0.027, "fp8_e5m2": 0.053, "int8": 0.0075, "int4": 0.125}
    assert all(error[name] < limit for name, limit in limits.items()), error


def test_an_unknown_dtype_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no such dtype(.|\n)*did you mean 'fp8'.*fp8_e5m2.*int4"):
        cache_dtype("fp9")
    assert cache_dtype("fp8") is cache_dtype("fp8_e4m3") is cache_dtype("fp8_per_token_head")
    assert cache_dtype(None).quant is cache_dtype("auto").quant is None
