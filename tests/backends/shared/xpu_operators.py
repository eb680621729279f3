"""Operators for Intel GPUs, on the CPU: they read every operand as their sources say, and refuse what those refuse.

Written element by element from PyTorch's ``mkldnn/xpu`` (Blas.cpp at 003d1b101f9e, detail/WoQMatmul.cpp at 088e390c9892) and from
``vllm-xpu-kernels`` (csrc/xpu/onednn); they share no code with the kernels of quantport.
"""

from __future__ import annotations

import torch
from torch import Tensor


def u4(words: Tensor, k: int) -> Tensor:
    """Codes ``[n, k]`` of oneDNN's u4 in int32 words ``[n, k / 8]``: K contiguous, the lowest nibble first."""
    assert words.dtype is torch.int32
    assert words.is_contiguous()
    assert words.shape[1] * 8 == k
    return torch.stack([words >> 4 * i & 15 for i in range(8)], -1).flatten(1)


def woq_matmul(x: Tensor, codes: Tensor, group: int, scale: Tensor, zero: Tensor) -> Tensor:
    """``woq_matmul_int4``: a scale and a zero point for each group of K and each column, ``[k / group, n]``."""
    assert scale.is_contiguous()
    assert scale.shape == (x.shape[1] // group, codes.shape[0])
    weight = (codes - zero.t().repeat_interleave(group, 1)) * scale.t().float().repeat_interleave(group, 1)
    return (x.float() @ weight.t()).to(x.dtype)


def int4pack_mm(x: Tensor, mat2: Tensor, group: int, scale: Tensor, zeros: Tensor) -> Tensor:
    """``_weight_int4pack_mm_xpu``."""
    (_, k), n = x.shape, mat2.shape[0]
    assert x.is_contiguous()
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert x.numel(), "oneDNN multiplies no empty matrices"
    assert group > 1
    assert group % 32 == k % group == 0
    assert scale.dtype is x.dtype, "as torchao has it"
    assert zeros.dtype is torch.int8
    assert zeros.shape == (k // group, n)
    assert zeros.is_contiguous()
    return woq_matmul(x, u4(mat2, k), group, scale, zeros)


def int4_gemm_w4a16(a, b, bias, b_scale, b_zp, group_size, g_idx):
    """``dnnl_matmul_w4a16_int4`` with one zero point, which its tests give as int8 ``[1]``."""
    k = a.shape[1]
    assert a.numel()
    assert g_idx is None
    assert b.stride(0) == 1, "words lie along K"
    assert b_scale.dtype is a.dtype
    assert (b_zp.shape, b_zp.dtype) == ((1,), torch.int8)
    y = woq_matmul(a, u4(b.t(), k), group_size, b_scale, b_zp.view(1, 1).expand_as(b_scale))
    return y if bias is None else (y.float() + bias.float()).to(a.dtype)


def fp8_gemm_w8a16(a, b, b_scale, bias):
    """``dnnl_matmul_w8a16_fp8``: scales of blocks where they are 2-D with more than one row, else one, or one for each column."""
    k, n = b.shape
    assert a.numel()
    assert b.dtype is torch.float8_e4m3fn
    assert b.stride(0) == 1
    assert b_scale.dtype is torch.float32
    if b_scale.dim() == 2 and b_scale.shape[0] > 1:
        assert k % b_scale.shape[0] == n % b_scale.shape[1] == 0
        group = k // b_scale.shape[0]
        assert group * b_scale.shape[1] == n, "oneDNN takes the group of K for N too"
        assert b_scale.is_contiguous()
        factors = b_scale.repeat_interleave(group, 0).repeat_interleave(group, 1)
    else:
        assert b_scale.numel() in (1, n)
        factors = b_scale.view(1, -1)
    y = a.float() @ (b.float() * factors)
    return (y if bias is None else y + bias.float()).to(a.dtype)


def fp8_gemm(a, b, out_dtype, a_scale, b_scale, bias):
    """``dnnl_matmul_w8a8_fp8``: blocks where the scales of A have more than one column."""
    (m, k), n = a.shape, b.shape[1]
    assert a.dtype is b.dtype is torch.float8_e4m3fn
    assert a.is_contiguous()
    assert b.stride(0) == 1
    assert out_dtype in (torch.bfloat16, torch.float16)
    assert a_scale.is_contiguous()
    assert b_scale.is_contiguous()
    if a_scale.dim() == 2 and a_scale.shape[1] > 1:
        assert a_scale.shape == (m, b_scale.shape[0])
        group_k, group_n = k // b_scale.shape[0], n // b_scale.shape[1]
        assert (group_k * b_scale.shape[0], group_n * b_scale.shape[1]) == (k, n)
        left = a_scale.repeat_interleave(group_k, 1)
        right = b_scale.repeat_interleave(group_k, 0).repeat_interleave(group_n, 1)
    else:
        assert a_scale.numel() in (1, m)
        assert b_scale.numel() in (1, n)
        left, right = a_scale.view(-1, 1), b_scale.view(1, -1)
    y = (a.float() * left) @ (b.float() * right)
    return (y if bias is None else y + bias.float()).to(out_dtype)


CPU_INT8 = torch.ops.aten._weight_int8pack_mm


def int8pack_mm(x: Tensor, mat2: Tensor, scales: Tensor) -> Tensor:
    """``_weight_int8pack_mm_xpu``, which reads scales in fp32; the CPU wants them in the dtype of x, and K % 16 == 0."""
    assert x.numel(), "oneDNN multiplies no empty matrices"
    assert x.stride(1) == 1
    assert mat2.is_contiguous()
    assert scales.shape == mat2.shape[:1]
    assert scales.dtype is torch.float32
    y = CPU_INT8(x.float(), mat2, torch.ones_like(scales)) if x.shape[1] % 16 == 0 else x.float() @ mat2.float().t()
    return (y * scales).to(x.dtype)
