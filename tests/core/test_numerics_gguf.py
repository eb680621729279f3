"""GGUF blocks against gguf-py, ggml's own Python: bytes of types of 32, values of every type. Of q8_k it
knows the size alone: its bytes are those of plain loops.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_peers import normal, patterns, peer
from torch import Tensor

from quantport import numerics
from quantport.errors import WeightError
from quantport.numerics import gguf
from quantport.scheme.catalog import BUILTIN
from quantport.scheme.formats import FORMATS
from quantport.scheme.scheme import GGUF_BYTES

NAMES = tuple(name for name in GGUF_BYTES if name in BUILTIN)
# offsets of fp16 numbers
OF_32 = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
LOSS = {"q2_k": -13, "q3_k": -6, "q4_k": 0.7, "q5_k": 5, "q6_k": 10}  # against q4_0, dB; less is worse
HALVES = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}


def kind(name: str) -> object:
    return getattr(peer("gguf").GGMLQuantizationType, name.upper())


def values_np(blocks: Tensor, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        values: np.ndarray = peer("gguf.quants").dequantize(blocks.numpy(), kind(name))
    return values


def same(found: Tensor, expected: np.ndarray) -> None:
    wrong = (found.numpy() != expected) | (np.signbit(found.numpy()) != np.signbit(expected)) & (
        expected != 0
    )
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size}"


@pytest.mark.parametrize("name", GGUF_BYTES)
def test_layout_is_that_of_ggml(name):
    assert peer("gguf").GGML_QUANT_SIZES[kind(name)] == (FORMATS[name].block, GGUF_BYTES[name])


def q8_k(row: np.ndarray) -> bytes:
    """One block of 256 fp32, number by number."""
    largest = np.float32(0)
    for x in row:
        if abs(x) > abs(largest):
            largest = x
    inverse = np.float32(-127) / largest if largest else np.float32(0)
    if not np.isfinite(inverse):
        inverse = np.float32(0)
    codes = np.array([np.rint(x * inverse) for x in row]).astype(np.int8)
    d = np.float32(1) / inverse if inverse else np.float32(0)
    sums = codes.reshape(16, 16).sum(1, dtype=np.int16)
    return np.float32(d).tobytes() + codes.tobytes() + sums.tobytes()


@np.errstate(all="ignore")
def test_bytes_of_q8_k():
    """Ties to even; the first of two largest gives the sign; zeros; blocks too small for an inverse."""
    steps = torch.arange(-128, 128) / 2
    tops = (127.0, -127.0, 1.0, 3e38, 2.0**-100, 4e-37, 3e-37, 2.0**-149, 0.0, -0.0)
    x = torch.stack([(steps / 63.5).clamp(-1, 1) * top for top in tops])
    x = torch.cat((x, x.flip(1), x.abs(), normal(64, 256), normal(64, 256, spread=4)))
    expected = np.frombuffer(b"".join(map(q8_k, x.numpy())), np.uint8)
    found = gguf.quantize(x, FORMATS["q8_k"])
    assert torch.equal(found.flatten(), torch.from_numpy(expected.copy()))
    d, codes = expected.reshape(-1, 292)[:, :4].copy().view(np.float32), expected.reshape(-1, 292)[:, 4:260]
    same(gguf.dequantize(found, FORMATS["q8_k"], 256), d * codes.view(np.int8).astype(np.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_or_an_inf_shows_in_the_output_of_its_token(name, bad):
    scheme, x = BUILTIN[f"{name}:a8"], normal(3, 300)
    x[1, 290] = bad
    y = numerics.linear(x, numerics.quantize_weight(normal(4, 300), scheme), scheme)
    assert y.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_values_of_a_million_random_bytes(name):
    """All bit patterns, but for an fp16 scale of NaN or Inf."""
    element, size = BUILTIN[name].weight.element, GGUF_BYTES[name]
    n = 64 * (1_000_000 // (64 * size) + 1)
    blocks = np.random.default_rng(0).integers(0, 256, (n, size), dtype=np.uint8)
    for offset in HALVES[name]:
        half = blocks[:, offset : offset + 2].copy().view(np.uint16)
        half[(half & 0x7C00) == 0x7C00] &= 0x83FF  # subnormals and zeros instead
        blocks[:, offset : offset + 2] = half.view(np.uint8)
    blocks = torch.from_numpy(blocks.reshape(64, -1))
    assert blocks.numel() >= 1_000_000
    same(gguf.dequantize(blocks, element, blocks.shape[1] // size * element.block), values_np(blocks, name))


@pytest.mark.parametrize("name", NAMES)
def test_values_of_our_own_blocks(name):
    for x in (
        normal(256, 1024),
        torch.zeros(2, 256),
        torch.full((2, 256), -3.0),
        normal(8, 512, spread=4).bfloat16(),
    ):
        stored = numerics.quantize_weight(x, BUILTIN[name])
        same(
            numerics.dequantize_weight(stored, BUILTIN[name], x.shape[1]),
            values_np(stored["weight_blocks"], name),
        )


@pytest.mark.parametrize("name", OF_32)
@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0], ids=str)
def test_bytes_of_a_million_weights(name, spread):
    top = 6e4 if name in ("q4_1", "q5_1") else 3e5  # offsets are fp16 too
    x = normal(1024, 1024, spread=spread).clamp(-top, top)
    expected = peer("gguf.quants").quantize(x.numpy(), kind(name))
    assert torch.equal(
        numerics.quantize_weight(x, BUILTIN[name])["weight_blocks"], torch.from_numpy(expected)
    )


@pytest.mark.parametrize("name", OF_32)
def test_bytes_of_ties_zeros_and_small_numbers(name):
    """Halves round away from zero; the first of two largest magnitudes gives the sign; zeros; fp16 subnormals
    and below.
    """
    steps = torch.arange(-16, 16) / 16
    x = torch.stack(
        [steps * top for top in (8.0, -8.0, 127.0, 254.0, 1.0, 2.0**-10, 1e-6, 1e-9, 2.0**-149, 0.0, -0.0)]
    )
    x = torch.cat((x, x.flip(1), x.abs()))
    tops = torch.tensor([127.0, 8.0, -8.0])[:, None, None]
    halves = (torch.arange(-128, 128) + 0.5).view(-1, 1, 1).clamp(-127, 127) * torch.ones(1, 1, 32)
    halves[:, :, 0] = 127
    x = torch.cat((x, halves.view(-1, 32), (torch.ones(3, 1, 32) * tops).view(-1, 32)))
    with np.errstate(all="ignore"):
        expected = peer("gguf.quants").quantize(x.numpy(), kind(name))
    assert torch.equal(gguf.quantize(x, BUILTIN[name].weight.element), torch.from_numpy(expected))


@pytest.mark.parametrize("name", OF_32)
def test_bytes_of_bit_patterns(name):
    """Everything between the largest scale that fp16 holds and the smallest fp32 whose inverse is finite."""
    x = patterns(1 << 20).nan_to_num(0, 0, 0).view(-1, 32)
    top = x.abs().amax(1, keepdim=True)
    x = torch.where((x.abs() < 3e5) & (top > 1e-30), x, 0.0)
    with np.errstate(all="ignore"):
        expected = peer("gguf.quants").quantize(x.numpy(), kind(name))
    assert torch.equal(gguf.quantize(x, BUILTIN[name].weight.element), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_quality_of_the_k_types(name):
    """gguf-py has no quantizer of these. q4_0 at the same 4.5 bits is 0.7 dB worse; a bit more or less is
    worth 5 dB.
    """
    x = normal(256, 1024, spread=0.3)

    def error(scheme: str) -> Tensor:
        stored = numerics.quantize_weight(x, BUILTIN[scheme])
        return 10 * torch.log10(
            x.square().sum() / (numerics.dequantize_weight(stored, BUILTIN[scheme], 1024) - x).square().sum()
        )

    assert error(name) - error("q4_0") > LOSS[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 31, 33, 255, 257])
def test_a_short_last_block_is_filled_with_zeros(name, k):
    x, element = normal(3, k), BUILTIN[name].weight.element
    whole = torch.nn.functional.pad(x, (0, -k % element.block))
    blocks = numerics.quantize_weight(x, BUILTIN[name])["weight_blocks"]
    assert torch.equal(blocks, gguf.quantize(whole, element))
    assert torch.equal(gguf.dequantize(blocks, element, k), torch.from_numpy(values_np(blocks, name))[:, :k])


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_beyond_fp16_is_refused_as_such(name):
    """It is an overflow and no NaN; ``nonfinite="zero"`` does not hide it."""
    x = normal(4, 256)
    x[2, 7] = 3e9
    for policy in ("error", "zero"):
        with pytest.raises(WeightError, match="overflow") as caught:
            numerics.quantize_weight(x, BUILTIN[name], "layers.0.up_proj", policy)
        assert "NaN" not in str(caught.value)
        assert "layers.0.up_proj" in caught.value.asked
        assert "fp8_weight_only" in caught.value.suggestion


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k"])
@pytest.mark.parametrize("size", [1e-6, 1e-7, 1e-9])
def test_scales_too_small_for_fp16_give_zeros_and_nothing_worse(name, size):
    """fp16 ends at 6e-8: a block whose scales vanish is all zero, never an offset without codes."""
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * size
    scheme = BUILTIN[name]
    found = numerics.dequantize_weight(numerics.quantize_weight(weight, scheme), scheme, 300)
    assert (found - weight).norm() <= weight.norm() * 1.0001
