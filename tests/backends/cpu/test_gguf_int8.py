"""GGUF blocks times activations in GGUF blocks: bytes and sums are those of the reference, bit for bit."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from quantport.numerics import gguf
from quantport.scheme.catalog import BUILTIN
from quantport.scheme.formats import FORMATS
from quantport.scheme.scheme import GGUF_BYTES
from quantport_cpu import jit

UNAVAILABLE = jit.why_unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "numba is installed")

if not UNAVAILABLE:
    from quantport_cpu.jit import gguf_batch, gguf_rows

NAMES = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k")
SCALES = {"q4_0": (0,), "q8_0": (0,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}  # of fp16, in a block


def with_scales(blocks: Tensor, name: str, *values: float) -> Tensor:
    """Blocks with other fp16 scales, the same in each."""
    out = blocks.clone()
    flat = out.view(-1, GGUF_BYTES[name])
    for at, value in zip(SCALES[name], values, strict=False):
        flat[:, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    return out


def random_blocks(name: str, n: int, k: int) -> Tensor:
    """Random codes and scales of sub-blocks; fp16 scales are between 0.5 and 2, or minus that."""
    size = GGUF_BYTES[name]
    blocks = torch.randint(0, 256, (n, -(-k // BUILTIN[name].weight.element.block) * size), dtype=torch.uint8)
    high = blocks.view(-1, size)[:, [at + 1 for at in SCALES[name]]]
    blocks.view(-1, size)[:, [at + 1 for at in SCALES[name]]] = high & 0x83 | 0x38
    return blocks


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fp32 ``a * b + c``, rounded once: in fp64, where it is rounded to odd before."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    toward_zero = bits - ((error < 0) == (total > 0)).long()
    return torch.where(error == 0, bits, toward_zero | 1).view(torch.float64).float()


def composed(x: Tensor, blocks: Tensor, name: str) -> Tensor:
    """The products as ``gemm_gguf`` promises them, from the bytes of the reference."""
    element, size = BUILTIN[name].weight.element, GGUF_BYTES[name]
    (m, _), (n, count) = x.shape, (blocks.shape[0], blocks.shape[1] // size)
    activation = BUILTIN[f"{name}:a8"].activation.element
    rows = gguf.quantize(x, activation).view(m, count, -1)
    d = gguf.scales(rows, activation).view(m, 1, count)
    codes = rows[..., 2:34] if element.block == 32 else rows[..., 4:260]
    codes = codes.contiguous().view(torch.int8).double().view(m, 1, count, element.block)
    scales = gguf.scales(blocks, element).view(n, count, -1)
    weights = gguf.dequantize(with_scales(blocks, name, 1, 0), element, count * element.block)
    weights = weights.double().view(n, count, element.block)
    terms = [scales[..., 0]]
    sums = codes.view(m, 1, count, 8, -1).sum(-1)  # of sub-blocks, where there are any
    taken = torch.zeros(m, n, count, 8, dtype=torch.float64)
    if name == "q6_k":
        of_16 = blocks.view(n, count, size)[..., 192:208].contiguous().view(torch.int8).double()
        weights += 32 * of_16.repeat_interleave(16, -1)
        taken = -32 * (of_16 * codes.view(m, 1, count, 16, 16).sum(-1)).view(m, n, count, 8, 2).sum(-1)
    lanes = [(weights * codes).view(m, n, count, -1, 8, 4).sum((3, 5)) + taken]
    if name in ("q4_k", "q5_k"):
        low = gguf.dequantize(with_scales(blocks, name, 0, 1), element, count * element.block)
        lanes.append(-low.view(n, count, 8, 32)[..., 0].double() * sums)
        terms.append(-scales[..., 1])
    total = torch.zeros(m, n, 8)
    for b in range(count):
        for term, lane in zip(terms, lanes, strict=True):
            total = fma((term[:, b] * d[..., b])[..., None], lane[:, :, b].float(), total)
    while total.shape[-1] > 1:
        total = total[..., : total.shape[-1] // 2] + total[..., total.shape[-1] // 2 :]
    return total[..., 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 33, 704), (9, 70, 1024)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_reference(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    m, n, k = shape
    blocks = random_blocks(name, n, k)
    x = (torch.randn(m, k) * torch.logspace(-2, 2, m)[:, None]).to(dtype)
    assert torch.equal(gguf_batch.multiply_quantized(x, blocks, name), composed(x, blocks, name))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("name", NAMES)
def test_no_sum_overflows(name: str, byte: int, sign: float) -> None:
    """Codes and scales at their ends, times the largest codes of either sign."""
    blocks = with_scales(torch.full_like(random_blocks(name, 3, 512), byte), name, 1, 1)
    x = torch.full((2, 512), sign)
    assert torch.equal(gguf_batch.multiply_quantized(x, blocks, name), composed(x, blocks, name))


class Rows(NamedTuple):
    """Activations in blocks, ``[M, blocks, ...]``."""

    codes: Tensor
    scales: Tensor
    sums: Tensor


def compiled_rows(x: Tensor, kind: int) -> Rows:
    """As the compiled kernel writes them."""
    rows, at = gguf_batch.quantized_rows(x, kind), gguf_rows.SCALE_AT[kind]
    blocks = rows.owner.view(len(x), -1, gguf_rows.BLOCK_BYTES[kind])
    scales = blocks[..., at : at + 4].contiguous().view(torch.float32)[..., 0]
    if kind == gguf_rows.SIGNED:  # even columns first
        codes = blocks[..., :64].contiguous().view(torch.int16)
        codes = codes.view(*codes.shape[:2], 2, 16).transpose(2, 3).flatten(2)
        return Rows(codes, scales, codes[..., :0])
    size = gguf_rows.COLUMNS[kind]
    sums = blocks[..., size:at].contiguous().view(torch.int16 if kind == gguf_rows.K else torch.int32)
    return Rows(blocks[..., :size].contiguous().view(torch.int8), scales, sums)


def reference_rows(x: Tensor, kind: int) -> Rows:
    """From the bytes of the reference."""
    element = FORMATS["q8_k" if kind == gguf_rows.K else "q8_0"]
    blocks = gguf.quantize(x, element)
    scales = gguf.scales(blocks, element).view(len(x), -1)
    blocks = blocks.view(len(x), -1, GGUF_BYTES[element.name])
    if kind == gguf_rows.K:
        sums = blocks[..., 260:].contiguous().view(torch.int16)
        return Rows(blocks[..., 4:260].contiguous().view(torch.int8), scales, sums)
    codes = blocks[..., 2:].contiguous().view(torch.int8)
    if kind == gguf_rows.SIGNED:
        return Rows(codes.short(), scales, codes[..., :0].short())
    fours = codes.view(*codes.shape[:2], 8, 4).sum(-1, dtype=torch.int32)
    return Rows(codes, scales, fours * (-8 if kind == gguf_rows.NIBBLES else -128))


def activations(k: int) -> Tensor:
    """Ties of every size, both signs of the largest, zeros, subnormals, huge numbers, NaN and Inf."""
    steps = torch.arange(k).remainder(255) - 127.0
    rows = [steps, -steps, steps.abs().flip(0), steps + 0.5, torch.randn(k), torch.randn(k) * 1e-6]
    rows += [steps.roll(9) * scale for scale in (2.0**-20, 2.0**100, 0.0, -0.0, 2.0**-149, 2.0**-130)]
    last = torch.randn(3, k)
    last[0, k // 2], last[1, 3], last[2, k - 1] = math.nan, math.inf, -math.inf
    return torch.cat((torch.stack(rows), last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 31, 256, 300, 1056])
@pytest.mark.parametrize("kind", range(4), ids=("nibbles", "unsigned", "signed", "k"))
def test_activations_become_the_bytes_of_the_reference(kind: int, k: int, dtype: torch.dtype) -> None:
    x = activations(max(k, 8))[:, :k].to(dtype)
    got, want = compiled_rows(x, kind), reference_rows(x, kind)
    is_told = want.scales.isfinite() & (want.scales != 0)  # codes mean nothing elsewhere
    assert torch.equal(got.scales.isfinite(), want.scales.isfinite())
    assert torch.equal(got.scales[want.scales == 0], want.scales[want.scales == 0])
    for found, expected in zip(got, want, strict=True):
        assert found.dtype is expected.dtype
        assert torch.equal(found[is_told], expected[is_told])
