"""Elements against ml_dtypes: every code, every tie, every special value, and 10^6 values of several
spreads.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from core_peers import patterns

from quantport.numerics import decode, encode, values_of
from quantport.numerics.elements import rounded
from quantport.scheme.formats import FORMATS

ML = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
INTEGERS = {"int8": (-128, 127), "int4": (-8, 7), "uint4": (0, 15)}
SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    -np.nan,
    1e-45,
    -1e-45,
    2.0**-126,
    3.4028235e38,
    -3.4028235e38,
    1.0,
    -1.0,
]


def codes_np(x: np.ndarray, name: str) -> np.ndarray:
    """The bytes that ml_dtypes gives: it overflows to Inf or NaN where quantport saturates, so it gets
    clamped values.
    """
    top = np.float32(ml_dtypes.finfo(ML[name]).max)
    with np.errstate(all="ignore"):
        return np.clip(x, -top, top).astype(ML[name]).view(np.uint8)


def values_np(name: str) -> np.ndarray:
    return np.arange(2 ** FORMATS[name].bits, dtype=np.uint8).view(ML[name]).astype(np.float32)


def check(x: np.ndarray, name: str) -> None:
    """Codes and values equal, the sign of zero included; NaN is NaN in the formats that have one."""
    element = FORMATS[name]
    codes = encode(torch.from_numpy(x.copy()), element)
    assert codes.dtype is element.storage
    found, expected = codes.view(torch.uint8).numpy(), codes_np(x, name)
    nan = np.isnan(x)
    assert (found[~nan] == expected[~nan]).all(), x[~nan][found[~nan] != expected[~nan]][:5]
    values = decode(codes, element).numpy()
    if element.bits == 8:
        assert np.isnan(values[nan]).all()
    assert (values[~nan].view(np.int32) == values_np(name)[expected[~nan]].view(np.int32)).all()
    again = rounded(torch.from_numpy(x[~nan]), element).numpy()
    assert (again == values[~nan]).all()  # its zeros are positive


@pytest.mark.parametrize("name", ML)
def test_every_code_decodes_and_encodes_back(name):
    element, expected = FORMATS[name], values_np(name)
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    values = decode(codes.view(element.storage), element)
    nan = np.isnan(expected)
    assert (values.numpy()[~nan].view(np.int32) == expected[~nan].view(np.int32)).all()
    assert np.isnan(values.numpy()[nan]).all()
    assert torch.equal(values_of(name).nan_to_num(-7777), values.nan_to_num(-7777))
    finite = values.isfinite()
    assert torch.equal(encode(values[finite], element).view(torch.uint8), codes[finite])
    assert values[finite].max() == element.high == float(ml_dtypes.finfo(ML[name]).max)
    assert values[finite].min() == element.low


@pytest.mark.parametrize("name", ML)
def test_every_tie_and_its_neighbours(name):
    values = values_np(name)
    values = np.unique(values[np.isfinite(values)])
    ties = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    check(np.concatenate((ties, *near, values)), name)


@pytest.mark.parametrize("name", ML)
def test_special_values_saturate_and_keep_their_sign(name):
    check(np.array(SPECIAL, np.float32), name)
    element = FORMATS[name]
    above = torch.tensor([float(np.nextafter(np.float32(element.high), np.float32(np.inf))), 1e38, torch.inf])
    assert (decode(encode(above.clone(), element), element) == element.high).all()
    assert (decode(encode(-above, element), element) == element.low).all()
    zero = decode(encode(torch.tensor([-0.0]), element), element)
    assert torch.signbit(zero).item() == (not name.endswith("fnuz")), "only the fnuz types have no -0"


@pytest.mark.parametrize("spread", [2.0**-8, 0.3, 1.0, 30.0, 1000.0], ids=str)
@pytest.mark.parametrize("name", ML)
def test_a_million_normal_values(name, spread):
    check((np.random.default_rng(0).standard_normal(200_000) * spread).astype(np.float32), name)


@pytest.mark.parametrize("name", ML)
def test_a_million_bit_patterns(name):
    check(patterns(1_000_000).numpy(), name)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_round_to_even_and_saturate(name):
    low, high = INTEGERS[name]
    element = FORMATS[name]
    ties = np.arange(low - 2, high + 2, dtype=np.float32) + 0.5
    x = np.concatenate(
        (ties, (np.random.default_rng(0).standard_normal(1_000_000) * high / 2).astype(np.float32))
    )
    x = np.concatenate((x, np.array([-0.0, np.inf, -np.inf, 1e-45, 3e38], np.float32)))
    codes = encode(torch.from_numpy(x.copy()), element)
    assert codes.dtype is element.storage
    assert (codes.numpy() == np.clip(np.rint(x), low, high)).all()
    assert torch.equal(decode(codes, element), codes.float())
    assert torch.equal(rounded(torch.from_numpy(x), element), codes.float())


def test_values_of_integers_are_in_the_order_of_their_codes():
    """Two's complement: code 8 of int4 is -8, code 128 of int8 is -128."""
    assert values_of("int4").tolist() == [*range(8), *range(-8, 0)]
    assert values_of("int8").tolist() == [*range(128), *range(-128, 0)]
    assert values_of("uint4").tolist() == [*range(16)]


def test_e8m0_against_ml_dtypes():
    """Every byte is a power of two from 2**-127, a subnormal of fp32, to 2**127, and 255 is NaN."""
    element = FORMATS["e8m0"]
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    values = decode(codes, element)
    assert (values[:255].numpy() == expected[:255]).all()
    assert values[255].isnan()
    assert np.isnan(expected[255])
    assert torch.equal(encode(values.clone(), element), codes)
    assert torch.equal(values_of("e8m0")[:255], values[:255])
    assert element.low == values[0].item()
    assert element.high == values[254].item()


def test_encode_may_overwrite_and_rounded_may_not():
    for element in FORMATS.values():
        if element.block or element.bits > 8 or element.name == "e8m0":
            continue
        x = torch.linspace(-9, 9, 64)
        before = x.clone()
        rounded(x, element)
        assert torch.equal(x, before), element.name
