"""float8 and bf16 without a conversion of them: what devices outside of PyTorch's tree get is bit for bit
what the CPU converts.
"""

import pytest
import torch

from quantport import numerics
from quantport.numerics import elements
from quantport.plugins.registry import default_registry
from quantport.scheme.formats import BF16, E4M3FN, E5M2
from quantport.testing import cases

FLOAT8 = pytest.mark.parametrize("element", [E4M3FN, E5M2], ids=lambda element: element.name)
SCHEMES = [s for s in default_registry().schemes.values() if "e4m3fn" in (s.weight.format, s.weight.scale)]


@pytest.fixture
def absent(monkeypatch):
    """Every device is one that converts no float8."""
    monkeypatch.setattr(elements, "converts", lambda device: False)


def values():
    """fp32 numbers of every exponent and sign: ties of 3, 2 and 1 bits, their neighbours, subnormals, zeros,
    Inf and NaN.
    """
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    bits = torch.cat((high, high + 1, high + 0xFFFF))
    return bits.view(torch.float32)


@FLOAT8
def test_encoding_equals_the_conversion(element, absent):
    x = values()
    codes = numerics.encode(x.clone(), element)
    converted = x.clamp(element.low, element.high).to(element.storage)
    number = ~x.isnan()
    assert codes.dtype is element.storage
    assert torch.equal(numerics.raw(codes)[number], numerics.raw(converted)[number])
    assert codes.float()[~number].isnan().all()


@FLOAT8
def test_decoding_equals_the_conversion(element, absent):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(element.storage)
    got, expected = numerics.decode(codes, element), codes.float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(torch.signbit(got), torch.signbit(expected))
    assert torch.equal(got.nan_to_num(nan=0), expected.nan_to_num(nan=0))


def test_decoding_bf16_equals_the_conversion(absent):
    codes = (torch.arange(1 << 16, dtype=torch.int32) - (1 << 15)).to(torch.int16).view(torch.bfloat16)
    got = numerics.decode(codes, BF16)
    assert torch.equal(got.view(torch.int32) >> 16, codes.view(torch.int16).int())
    assert torch.equal(got.nan_to_num(nan=0), codes.float().nan_to_num(nan=0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_weights_have_the_same_bytes(scheme, monkeypatch):
    for name, make in cases.specials(scheme):
        weight = make(48, 200)
        with monkeypatch.context() as without:
            without.setattr(elements, "converts", lambda device: False)
            stored = numerics.quantize_weight(weight, scheme)
            values = numerics.dequantize_weight(stored, scheme, 200, torch.bfloat16)
        expected = numerics.quantize_weight(weight, scheme)
        assert all(cases.same_bits(stored[key], expected[key]) for key in expected), name
        assert cases.same_bits(values, numerics.dequantize_weight(expected, scheme, 200, torch.bfloat16)), (
            name
        )


def test_devices_of_pytorchs_own_tree_convert():
    assert numerics.converts(torch.device("cpu"))
    assert not numerics.converts(torch.device(torch._C._get_privateuse1_backend_name()))


@FLOAT8
def test_decoding_on_a_cpu_equals_the_conversion(element):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(element.storage)
    whole = numerics.decode(codes, element), codes.float()
    every_other = numerics.decode(codes.view(16, 16)[:, ::2], element), codes.view(16, 16)[:, ::2].float()
    for got, expected in (whole, every_other):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(torch.signbit(got), torch.signbit(expected))
        assert torch.equal(got.nan_to_num(nan=0), expected.nan_to_num(nan=0))
