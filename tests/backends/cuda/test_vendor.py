"""Kernels of the vendor's libraries on the CPU, against operators that read every operand as PyTorch's CUDA
sources do.

``ScaledBlas.cpp`` at 0174dfabc023 checks sizes and strides before it calls cuBLASLt; ``int4mm.cu`` at
05f814fecfca says which lane reads which code. The operators here follow them element by element and share no
code with the kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agrees import packing_loses_nothing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantport import numerics
from quantport.backend import Kernel, WeightSpec
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases
from quantport.testing.check_runs import compare, make_job
from quantport_cuda.kernels.block_scaled import CudaScaledMX, CudaScaledNV
from quantport_cuda.kernels.int4 import CudaInt4Pack, pack_tiles, unpack_tiles
from quantport_cuda.kernels.int8 import CudaIntMM
from quantport_cuda.kernels.scaled import CudaScaledBlocks, CudaScaledMM
from quantport_triton import quantize as quantizing
from quantport_triton.quantize import quantize, swizzled, unswizzled

F = torch.nn.functional
CPU = torch.device("cpu")
V2 = hasattr(F, "scaled_mm")  # torch 2.10


def up(a: int, b: int) -> int:
    return -(-a // b) * b


def values(operand: Tensor) -> Tensor:
    """The values ``[rows, k]`` of a row-major operand; fp4 has two codes in a byte, the first in the low
    half.
    """
    if operand.dtype is torch.float4_e2m1fn_x2:
        codes = operand.view(torch.uint8).contiguous()
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        return table[torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()]
    return operand.float()


def offset(row: int, column: int, columns: int) -> int:
    """The offset at which cuBLASLt reads the scale of a row and a block of K (its documentation, "1D Block
    Scaling Factors Layout").
    """
    tile = row // 128 * -(-columns // 4) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def block_scales(flat: Tensor, rows: int, k: int, block: int) -> Tensor:
    """One-byte scales, repeated for each element: fp32 ``[rows, k]``."""
    columns = -(-k // block)
    assert flat.is_contiguous()
    assert flat.numel() == up(rows, 128) * up(columns, 4)
    place = torch.tensor([[offset(r, c, columns) for c in range(columns)] for r in range(rows)])
    bits = flat.view(torch.uint8).view(-1)[place]
    scale = (
        bits.view(torch.float8_e4m3fn).float()
        if flat.dtype is torch.float8_e4m3fn
        else torch.exp2(bits.float() - 127)
    )
    return scale.repeat_interleave(block, 1)[:, :k]


def check_operands(a: Tensor, b: Tensor) -> None:
    assert a.stride(1) == 1
    assert b.stride(0) == 1
    assert a.shape[1] == b.shape[0]
    assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0


def scaled_mm(a, b, *, scale_a, scale_b, out_dtype):
    """``torch._scaled_mm`` with one-byte block scales: MXFP8 and NVFP4."""
    check_operands(a, b)
    if not a.shape[0]:
        return torch.empty(0, b.shape[1], dtype=out_dtype)
    x, w = values(a), values(b.t())
    (m, k), n = x.shape, w.shape[0]
    block = {torch.float8_e4m3fn: 16, torch.float8_e8m0fnu: 32}[scale_a.dtype]
    x, w = x * block_scales(scale_a, m, k, block), w * block_scales(scale_b, n, k, block)
    return (x @ w.t()).to(out_dtype)


def scaled_mm_v2(
    a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a=None, swizzle_b=None, output_dtype=torch.bfloat16
):
    """``F.scaled_mm``: 1x128 by 128x128 blocks (``_scaled_block1x128_block128x128``), and MXFP4."""
    check_operands(a, b)
    if not a.shape[0]:
        return torch.empty(0, b.shape[1], dtype=output_dtype)
    recipe = F.ScalingType
    if recipe_a is recipe.BlockWise1x32:
        assert a.dtype is torch.float4_e2m1fn_x2
        assert recipe_b is recipe.BlockWise1x32
        assert swizzle_a is swizzle_b is F.SwizzleType.SWIZZLE_32_4_4
        return scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=output_dtype)
    assert (recipe_a, recipe_b) == (recipe.BlockWise1x128, recipe.BlockWise128x128)
    (m, k), n = a.shape, b.shape[1]
    blocks, padded = -(-k // 128), up(-(-k // 128), 4)
    assert scale_a.shape == (m, blocks)
    assert scale_a.stride(0) == 1
    assert scale_a.stride(1) == m or (blocks == 1 and scale_a.stride(1) == 1)
    assert m % 4 == 0, "columns of scales would not be aligned"
    assert scale_b.shape == (padded, -(-n // 128))
    assert scale_b.stride(0) == 1
    assert scale_b.stride(1) == padded or scale_b.shape[1] == 1
    tokens = scale_a.repeat_interleave(128, 1)
    weight = scale_b.t()[:, :blocks].repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    return ((a.float() * tokens) @ (b.t().float() * weight).t()).to(output_dtype)


def columns_of(lane: int, nibble: int) -> int:
    """The column, of 32, of a nibble in ``matrix_to_m16n8k16_Bint4_layout``: of the bytes lane%4 + 0, 4, 8,
    12, the high halves first.
    """
    byte = lane % 4 + 4 * (nibble % 4)
    return 2 * byte + nibble // 4


def int4pack_codes(packed: Tensor) -> Tensor:
    """Codes ``[n, k]`` as the lanes of ``tinygemm_m16n8k16_chunk_kernel`` read them."""
    rows, supers, lanes, half = packed.shape
    assert lanes == 32
    assert packed.is_contiguous()
    codes = torch.empty(rows * 8, supers * half * 32, dtype=torch.int32)
    for lane in range(32):
        for nibble in range(8):
            column = columns_of(lane, nibble)
            codes[lane // 4 :: 8, column::32] = (packed[:, :, lane] >> 4 * nibble & 15).flatten(1)
    return codes


def int4pack_mm(x: Tensor, packed: Tensor, group: int, scale_and_zeros: Tensor) -> Tensor:
    codes = int4pack_codes(packed)
    n, k = codes.shape
    assert x.dtype is scale_and_zeros.dtype is torch.bfloat16
    assert x.is_contiguous()
    assert x.shape[1] == k
    assert k % group == 0
    assert scale_and_zeros.shape == (k // group, n, 2)
    scale, zero = (t.t().float().repeat_interleave(group, 1) for t in scale_and_zeros.unbind(-1))
    weight = ((codes - 8) * scale + zero).bfloat16()  # __hfma2: rounded once
    return (x.float() @ weight.float().t()).bfloat16()


@pytest.fixture(autouse=True)
def _quiet():
    """Activations are quantized in Triton's interpreter, where numpy warns where a GPU is silent."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    if V2:
        monkeypatch.setattr(F, "scaled_mm", scaled_mm_v2)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", int4pack_mm)


RUNS: list[tuple[Kernel, str, tuple[tuple[int, int], ...]]] = [
    (CudaScaledBlocks(), "fp8_per_block", ((128, 128), (256, 640))),
    (CudaScaledMX(), "mxfp8", ((64, 256), (144, 96))),
    (CudaScaledMX(), "mxfp8:rceil", ((64, 256),)),
    (CudaScaledMX(), "mxfp4", ((64, 256), (144, 96))),
    (CudaScaledMX(), "mxfp4:mse", ((64, 256),)),
    (CudaScaledNV(), "nvfp4", ((64, 256), (144, 96))),
    (CudaScaledNV(), "nvfp4:mse", ((64, 256),)),
    (CudaInt4Pack(), "int4_weight_only", ((64, 256), (8, 128))),
    (CudaInt4Pack(), "int4_weight_only_g32", ((64, 256), (16, 96), (24, 64))),
    (CudaInt4Pack(), "int4_mse", ((64, 256), (8, 64))),
    (CudaInt4Pack(), "int4_hqq", ((64, 256),)),
    (CudaInt4Pack(), "int4_w4a8", ((64, 256),)),
]
if not V2:
    RUNS = [run for run in RUNS if run[1] != "fp8_per_block" and not run[1].startswith("mxfp4")]
IDS = [f"{kernel.name}-{scheme}" for kernel, scheme, _ in RUNS]


@pytest.mark.parametrize(("kernel", "scheme", "shapes"), RUNS, ids=IDS)
def test_meets_the_reference(emulated, kernel, scheme, shapes):
    for n, k in shapes:
        spec = WeightSpec(BUILTIN[scheme], n, k)
        jobs = [
            make_job(
                spec,
                numerics.quantize_weight(cases.plain(n, k), spec.scheme),
                cases.activations(rows, k, torch.bfloat16),
                bias,
                kernel.quantizes_activations,
            )
            for rows, bias in ((1, None), (6, None), (17, cases.bias(n, torch.bfloat16)), (130, None))
        ]
        assert compare(kernel, jobs, CPU) == ""


@pytest.mark.parametrize(("kernel", "scheme", "shapes"), RUNS, ids=IDS)
def test_special_weights(emulated, kernel, scheme, shapes):
    (n, k), spec = shapes[0], WeightSpec(BUILTIN[scheme], *shapes[0])
    for name, make in cases.specials(spec.scheme):
        job = make_job(
            spec,
            numerics.quantize_weight(make(n, k), spec.scheme),
            cases.activations(5, k, torch.bfloat16),
            None,
            kernel.quantizes_activations,
        )
        assert compare(kernel, [job], CPU) == "", name


@pytest.mark.parametrize(("kernel", "scheme", "shapes"), RUNS, ids=IDS)
def test_packing_loses_nothing_and_no_rows_are_no_rows(emulated, kernel, scheme, shapes):
    packing_loses_nothing(kernel, scheme, shapes)


@pytest.mark.parametrize(
    ("kernel", "scheme"),
    [(CudaScaledMM(), "fp8_per_tensor"), (CudaScaledMM(), "fp8_per_channel"), (CudaIntMM(), "int8")],
)
def test_meets_the_reference_by_the_operators_of_the_cpu(kernel, scheme):
    """The CPU has ``_scaled_mm`` with row scales and ``_int_mm`` too."""
    for n, k in ((64, 256), (48, 208)):
        spec = WeightSpec(BUILTIN[scheme], n, k)
        for rows, bias in ((1, None), (16, None), (17, cases.bias(n, torch.bfloat16))):
            job = make_job(
                spec,
                numerics.quantize_weight(cases.plain(n, k), spec.scheme),
                cases.activations(rows, k, torch.bfloat16),
                bias,
                True,
            )
            assert compare(kernel, [job], CPU) == ""
    for name, make in cases.specials(spec.scheme):
        job = make_job(
            spec,
            numerics.quantize_weight(make(48, 208), spec.scheme),
            cases.activations(5, 208, torch.bfloat16),
            None,
            True,
        )
        assert compare(kernel, [job], CPU) == "", name


def test_int8_answers_in_fp16_where_bf16_does_not_exist():
    spec = WeightSpec(BUILTIN["int8"], 64, 96)
    job = make_job(
        spec,
        numerics.quantize_weight(cases.plain(64, 96), spec.scheme),
        cases.activations(5, 96, torch.float16),
        cases.bias(64, torch.float16),
        True,
    )
    assert compare(CudaIntMM(), [job], CPU) == ""


def test_more_rows_than_int32_indices_allow(emulated, monkeypatch):
    spec = WeightSpec(BUILTIN["int4_weight_only"], 64, 256)
    job = make_job(
        spec,
        numerics.quantize_weight(cases.plain(64, 256), spec.scheme),
        cases.activations(40, 256, torch.bfloat16),
        cases.bias(64, torch.bfloat16),
        False,
    )
    monkeypatch.setattr("quantport_cuda.kernels.int4._MAX_ELEMENTS", 256 * 16 + 1)
    assert compare(CudaInt4Pack(), [job], CPU) == ""


def test_a_token_with_an_infinity_is_the_only_one_that_is_lost(emulated):
    spec = WeightSpec(BUILTIN["nvfp4"], 64, 256)
    packed = CudaScaledNV().pack(numerics.quantize_weight(cases.plain(64, 256), spec.scheme), spec)
    x = cases.activations(4, 256, torch.bfloat16)
    x[2, 7] = torch.inf
    y = CudaScaledNV().run(x, packed, None, spec)
    assert torch.isfinite(y[[0, 1, 3]]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 11), st.integers(0, 2**32 - 1))
def test_scales_lie_where_tensor_cores_read_them(rows, columns, seed):
    scale = torch.randint(
        0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    flat = swizzled(scale)
    expected = torch.zeros(up(rows, 128) * up(columns, 4), dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            expected[offset(r, c, columns)] = scale[r, c]
    assert torch.equal(flat.view(-1), expected)
    assert torch.equal(unswizzled(flat, rows, columns), scale)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_codes_lie_where_lanes_read_them(rows, columns, seed):
    shape = (rows * 8, columns * 32)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_tiles(codes)
    assert packed.shape[-1] == (4 if columns % 4 == 0 else 2 if columns % 2 == 0 else 1)
    assert torch.equal(int4pack_codes(packed), codes.int())
    assert torch.equal(unpack_tiles(packed), codes)


@pytest.mark.parametrize("scheme", ["fp8_per_channel", "fp8_per_block", "int8", "mxfp8", "mxfp4", "nvfp4"])
def test_without_triton_activations_get_the_same_bits_and_layouts(monkeypatch, scheme):
    quant = BUILTIN[scheme].activation
    layout = (
        {"swizzle": True}
        if quant.group_size in (16, 32)
        else {"transposed": True}
        if quant.group_size
        else {}
    )
    x = cases.activations(37, 256, torch.bfloat16)
    fast = quantize(x, quant, **layout)
    monkeypatch.setattr(quantizing, "compiles_for", lambda target: False)
    slow = quantize(x, quant, **layout)
    for left, right in zip(fast, slow, strict=True):
        assert left is right is None or (cases.same_bits(left, right) and left.stride() == right.stride())
