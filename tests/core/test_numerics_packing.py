"""Packings against plain bit arithmetic, and against compressed-tensors' packers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_peers import peer

from quantport import numerics
from quantport.numerics import decode
from quantport.scheme.formats import E2M1, E2M3

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 31, 32, 33, 127, 1024]


def bits_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """The codes of each row as one long integer, the first code in its lowest bits, as bytes."""
    count = codes.shape[1] * bits
    rows = [
        sum(int(code) << bits * i for i, code in enumerate(row)).to_bytes(-(-count // 8), "little")
        for row in codes
    ]
    return np.array([list(row) for row in rows], np.uint8).reshape(len(rows), -1)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("k", WIDTHS)
def test_bytes_are_one_little_endian_integer(k, bits):
    codes = torch.from_numpy(np.random.default_rng(k).integers(0, 2**bits, (5, k), dtype=np.uint8))
    packed = numerics.pack_bits(codes, bits)
    expected = bits_of(codes.numpy(), bits)
    assert packed.dtype is torch.uint8
    assert (packed.numpy()[:, : expected.shape[1]] == expected).all()
    assert not packed[:, expected.shape[1] :].any(), "what lies past k is zero"
    assert torch.equal(numerics.unpack_bits(packed, k, bits), codes)


@pytest.mark.parametrize("k", WIDTHS)
def test_int4_words_are_one_little_endian_integer(k):
    codes = torch.from_numpy(np.random.default_rng(k).integers(-8, 8, (5, k), dtype=np.int8))
    packed = numerics.pack_int4(codes)
    expected = bits_of(codes.numpy().astype(int) + 8, 4)
    found = packed.numpy().view(np.uint8)
    assert (found[:, : expected.shape[1]] == expected).all()
    assert not found[:, expected.shape[1] :].any()
    assert torch.equal(numerics.unpack_int4(packed, k), codes)


@pytest.mark.parametrize("bits", [4, 6])
def test_every_code_in_every_place(bits):
    group = {4: 2, 6: 4}[bits]
    for place in range(group):
        codes = torch.zeros(2**bits, group, dtype=torch.uint8)
        codes[:, place] = torch.arange(2**bits, dtype=torch.uint8)
        assert (numerics.pack_bits(codes, bits).numpy() == bits_of(codes.numpy(), bits)).all()


def test_views_and_empty_rows():
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (16, 12), dtype=np.uint8))
    for bits in (4, 6):
        low = codes & (2**bits - 1)
        assert torch.equal(numerics.pack_bits(low.t(), bits), numerics.pack_bits(low.t().contiguous(), bits))
        wide = numerics.pack_bits(low, bits).repeat_interleave(2, 1)[:, ::2]
        assert torch.equal(numerics.unpack_bits(wide, 12, bits), low)
        for n, k in ((0, 12), (3, 0), (0, 0)):
            packed = numerics.pack_bits(torch.empty(n, k, dtype=torch.uint8), bits)
            assert packed.shape == (n, {4: -(-k // 2), 6: 3 * -(-k // 4)}[bits])
            assert numerics.unpack_bits(packed, k, bits).shape == (n, k)


def test_int4_as_compressed_tensors():
    """A million codes, odd widths too. Past k both have zero nibbles."""
    pack = peer("compressed_tensors.compressors.pack_quantized.helpers")
    for n, k in ((1000, 1000), (7, 1), (7, 9), (3, 33)):
        codes = torch.from_numpy(np.random.default_rng(k).integers(-8, 8, (n, k), dtype=np.int8))
        packed = numerics.pack_int4(codes)
        assert torch.equal(pack.pack_to_int32(codes, 4), packed)
        assert torch.equal(pack.unpack_from_int32(packed, 4, torch.Size((n, k))), codes)


def test_fp4_as_compressed_tensors():
    helpers = peer("compressed_tensors.compressors.nvfp4.helpers")
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 16, (1000, 1000), dtype=np.uint8))
    packed = numerics.pack_bits(codes, 4)
    assert torch.equal(helpers.pack_fp4_to_uint8(decode(codes, E2M1)), packed)
    assert torch.equal(helpers.unpack_fp4_from_uint8(packed, 1000, 1000, torch.float32), decode(codes, E2M1))


def test_fp6_as_compressed_tensors():
    helpers = peer("compressed_tensors.compressors.mxfp6.helpers")
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (1000, 1000), dtype=np.uint8))
    packed = numerics.pack_bits(codes, 6)
    assert torch.equal(helpers.pack_fp6_to_uint8(decode(codes, E2M3)), packed)
    assert torch.equal(helpers.unpack_fp6_from_uint8(packed, 1000, 1000, torch.float32), decode(codes, E2M3))
