"""Code books against bitsandbytes: values, codes given the same largest magnitudes, bytes, the 8-bit code of
scales.

Named differences, each with a test. bitsandbytes multiplies by a reciprocal, here is a true division: a value
within a rounding of a midpoint may get the neighbouring code. It puts the first code into the high nibble,
here the low one. Of FP4's two zeros it may store the second, here the first. Its scale of zeros is 0. Its
blocks run over the flattened weight, here each row begins a block. Double quantization there takes the mean
as the offset and 256 scales at a time; here the middle, and rows.
"""

from __future__ import annotations

import pytest
import torch
from core_peers import normal, peer
from torch import Tensor

from quantport import numerics
from quantport.numerics.blocks import quantize_blocks
from quantport.numerics.codebooks import CODEBOOKS, nearest
from quantport.scheme.catalog import BUILTIN

NAMES = ("nf4", "fp4")
TABLES = {name: torch.tensor(values) for name, values in CODEBOOKS.items()}


def bitsandbytes(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Bytes with the nibbles swapped, and largest magnitudes, as bitsandbytes has them. Of FP4's two zeros 0
    is used.
    """
    packed, state = peer("bitsandbytes.functional").quantize_4bit(x, blocksize=64, quant_type=name)
    codes = numerics.unpack_bits(swapped(packed.view(x.shape[0], -1)), x.shape[1], 4)
    if name == "fp4":
        codes[codes == 8] = 0
    return numerics.pack_bits(codes, 4), state.absmax.view(x.shape[0], -1)


def swapped(packed: Tensor) -> Tensor:
    return packed << 4 | packed >> 4


@pytest.mark.parametrize("name", NAMES)
def test_code_book(name):
    theirs = peer("bitsandbytes.functional").get_4bit_type(name, device="cpu")
    assert torch.equal(theirs, TABLES[name])
    assert torch.equal(numerics.values_of(name), TABLES[name])


def test_dynamic_code_of_scales():
    """256 values from -0.993 to 1, ascending; the map that bitsandbytes quantizes scales with."""
    theirs = peer("bitsandbytes.functional").create_dynamic_map()
    assert torch.equal(theirs, TABLES["dynamic8"])
    assert len(TABLES["dynamic8"].unique()) == 256


@pytest.mark.parametrize("name", [*NAMES, "dynamic8"])
def test_nearest_is_nearest(name):
    """By exhaustion in fp64; every midpoint goes down, and what is next to it to its own side."""
    table = TABLES[name].double()
    x = torch.cat([torch.linspace(-1.2, 1.2, 20_001), normal(1, 20_000)[0], TABLES[name]])
    error = (table[nearest(x, name).int()] - x).abs()
    assert torch.equal(error, (x.double()[:, None] - table).abs().amin(1))
    values = TABLES[name].unique()
    middle = (values[1:] + values[:-1]) / 2
    below, above = (torch.nextafter(middle, torch.tensor(side)) for side in (-torch.inf, torch.inf))
    found = [TABLES[name][nearest(side, name).int()] for side in (below, middle, above)]
    assert torch.equal(found[0], values[:-1])
    assert torch.equal(found[1], values[:-1])
    assert torch.equal(found[2], values[1:])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_a_million_weights(name):
    """Largest magnitudes that are powers of two, so that a reciprocal is exact: every byte."""
    x = normal(1024, 1024).view(1024, 16, 64)
    x = x / x.abs().amax(2, keepdim=True)
    x = torch.ldexp(x, torch.arange(-8, 8)[:, None]).view(1024, 1024)
    packed, absmax = bitsandbytes(x, name)
    stored = numerics.quantize_weight(x, BUILTIN[name])
    assert torch.equal(stored["weight_scale"], absmax)
    assert torch.equal(stored["weight_packed"], packed)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_all_midpoints(name):
    """Amax 1: midpoints, their neighbours and the values themselves, FP4's second zero included."""
    values = TABLES[name].unique()
    middle = (values[1:] + values[:-1]) / 2
    sides = [torch.nextafter(middle, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    x = torch.cat([values, middle, *sides, torch.tensor([-0.0])])
    x = torch.nn.functional.pad(x.view(1, -1), (0, -len(x) % 63)).view(-1, 63)
    x = torch.cat((torch.ones(len(x), 1), x), 1)
    stored = numerics.quantize_weight(x, BUILTIN[name])
    assert torch.equal(stored["weight_packed"], bitsandbytes(x, name)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_named_difference_of_a_reciprocal(name, dtype):
    """On arbitrary weights the largest magnitudes are equal, and codes but for some, by one step.

    A few in a million; of bf16 weights under FP4, whose midpoints are simple fractions, one in 2000.
    """
    x = normal(1024, 1024, spread=1.0).to(dtype)
    packed, absmax = bitsandbytes(x, name)
    blocks = quantize_blocks(x, BUILTIN[name].weight)
    assert torch.equal(blocks.scale, absmax.float())
    theirs = numerics.unpack_bits(packed, 1024, 4)
    wrong = blocks.codes != theirs
    assert wrong.float().mean() < (1e-3 if name == "fp4" else 2e-5)
    rank = TABLES[name].argsort(stable=True).argsort(stable=True)
    assert ((rank[blocks.codes.int()] - rank[theirs.int()]).abs() <= 1 + (name == "fp4")).all()


def test_named_difference_of_bytes_and_zeros():
    """The first code is in the high nibble there; what rounds to FP4's zero from above gets its second zero,
    8, there.
    """
    x = torch.cat((torch.tensor([1.0, 0.001, -0.001, 0.0]), torch.zeros(60)))[None]
    packed = peer("bitsandbytes.functional").quantize_4bit(x, blocksize=64, quant_type="fp4")[0].flatten()
    assert packed[:2].tolist() == [0x38, 0x00]
    assert numerics.quantize_weight(x, BUILTIN["fp4"])["weight_packed"][0, :2].tolist() == [0x03, 0x00]
    table = TABLES["fp4"]
    assert table[0] == table[8] == 0


@pytest.mark.parametrize("name", NAMES)
def test_dequantized_values(name):
    x = normal(256, 512)
    functional = peer("bitsandbytes.functional")
    stored = numerics.quantize_weight(x, BUILTIN[name])
    theirs = torch.ops.bitsandbytes.dequantize_4bit.default(
        swapped(stored["weight_packed"]).view(-1, 1),
        stored["weight_scale"].view(-1),
        64,
        name,
        x.shape,
        torch.float32,
    )
    assert functional.get_4bit_type(name, device="cpu").dtype is torch.float32
    assert torch.equal(numerics.dequantize_weight(stored, BUILTIN[name], 512), theirs)


def test_named_difference_of_zero_blocks():
    """bitsandbytes stores 0, here the smallest usable scale; the values are 0 on both sides."""
    x = torch.zeros(1, 64)
    assert bitsandbytes(x, "nf4")[1].item() == 0
    stored = numerics.quantize_weight(x, BUILTIN["nf4"])
    assert stored["weight_scale"].item() == 2.0**-23
    assert not numerics.dequantize_weight(stored, BUILTIN["nf4"], 64).any()


def test_double_quantization_is_no_worse_than_that_of_bitsandbytes():
    """Squared error beside ``compress_statistics``; and single quantization is better than either, by
    little.
    """
    functional = peer("bitsandbytes.functional")
    for spread in (0.0, 0.5):
        x = normal(256, 4096, spread=spread)
        theirs = functional.dequantize_4bit(
            *functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
        )
        errors = []
        for name in ("nf4", "nf4:double"):
            scheme = BUILTIN[name]
            errors.append(
                (numerics.dequantize_weight(numerics.quantize_weight(x, scheme), scheme, 4096) - x)
                .square()
                .sum()
            )
        assert errors[0] <= errors[1]
        assert errors[1] <= 1.02 * (theirs - x).square().sum()
