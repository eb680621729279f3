"""Operators for Intel GPUs on the CPU: they read every operand as their sources do, and refuse what those
refuse.

Written element by element from PyTorch's ``mkldnn/xpu`` (Blas.cpp at 003d1b101f9e, detail/WoQMatmul.cpp at
088e390c9892), from ``vllm-xpu-kernels`` (csrc/xpu/onednn, csrc/quantization), and from Intel's extension;
they share no code with the kernels of quantport.
"""

from __future__ import annotations

import torch
from torch import Tensor


def u4(words: Tensor, k: int) -> Tensor:
    """Codes ``[n, k]`` of oneDNN's u4 in int32 words ``[n, k / 8]``: K contiguous, the lowest nibble
    first.
    """
    assert words.dtype is torch.int32
    assert words.is_contiguous()
    assert words.shape[1] * 8 == k
    return torch.stack([words >> 4 * i & 15 for i in range(8)], -1).flatten(1)


def woq_matmul(x: Tensor, codes: Tensor, group: int, scale: Tensor, zero: Tensor) -> Tensor:
    """``woq_matmul_int4``: a scale and a zero point for each group of K and each column, ``[k /
    group, n]``.
    """
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
    """``dnnl_matmul_w8a16_fp8``: scales are of blocks where they are 2-D with more than one row, else one or
    one for each column.
    """
    k, n = b.shape
    assert a.numel()
    assert a.dtype in (torch.bfloat16, torch.float16)
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
    """``dnnl_matmul_w8a8_fp8``: scales are of blocks where those of A have more than one column; both in fp32
    or both in e8m0.
    """
    (m, k), n = a.shape, b.shape[1]
    assert a.dtype is b.dtype is torch.float8_e4m3fn
    assert a.is_contiguous()
    assert b.stride(0) == 1
    assert out_dtype in (torch.bfloat16, torch.float16)
    assert a_scale.is_contiguous()
    assert b_scale.is_contiguous()
    assert a_scale.dtype is b_scale.dtype
    assert a_scale.dtype in (torch.float32, torch.float8_e8m0fnu)
    left, right = a_scale.float(), b_scale.float()
    if a_scale.dim() == 2 and a_scale.shape[1] > 1:
        assert a_scale.shape == (m, b_scale.shape[0])
        group_k, group_n = k // b_scale.shape[0], n // b_scale.shape[1]
        assert (group_k * b_scale.shape[0], group_n * b_scale.shape[1]) == (k, n)
        left = left.repeat_interleave(group_k, 1)
        right = right.repeat_interleave(group_k, 0).repeat_interleave(group_n, 1)
    else:
        assert a_scale.numel() in (1, m)
        assert b_scale.numel() in (1, n)
        left, right = left.view(-1, 1), right.view(1, -1)
    y = (a.float() * left) @ (b.float() * right)
    return (y if bias is None else y + bias.float()).to(out_dtype)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e2m1(codes: Tensor) -> Tensor:
    """Values ``[rows, k]`` of ``float4_e2m1fn_x2 [rows, k / 2]``, the first in the low half."""
    assert codes.dtype is torch.float4_e2m1fn_x2
    pairs = codes.view(torch.uint8).int()
    return E2M1[torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)]


def fp4_gemm(a, b, a_scale, b_scale, out_dtype, bias):
    """``dnnl_matmul_w4a4_fp4``: e8m0 scales in groups ``{1, 32}`` of A and ``{32, 1}`` of B, row-major."""
    m, n, k = a.shape[0], b.shape[1], 2 * a.shape[1]
    assert a.numel()
    assert a.is_contiguous()
    assert b.stride(0) == 1, "codes lie along K"
    assert out_dtype in (torch.bfloat16, torch.float16)
    assert None not in (a_scale, b_scale)
    assert a_scale.dtype is b_scale.dtype is torch.float8_e8m0fnu
    assert (a_scale.shape, b_scale.shape) == ((m, k // 32), (k // 32, n))
    assert a_scale.is_contiguous()
    assert b_scale.is_contiguous()
    left = e2m1(a) * a_scale.float().repeat_interleave(32, 1)
    right = e2m1(b.t()) * b_scale.float().t().repeat_interleave(32, 1)
    y = left @ right.t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


def per_token_group_quant_mxfp4(x, output_q, output_s, group_size, eps):
    """``per_token_group_quant_mxfp4_vec_kernel``: scales are amax / 6 rounded up, and a code is the number of
    midpoints below |x|.
    """
    assert x.is_contiguous()
    assert output_q.is_contiguous()
    assert group_size == 32
    assert (output_q.dtype, output_s.dtype) == (torch.uint8, torch.float32)
    groups = x.float().view(len(x), -1, 32)
    scale = torch.exp2(torch.ceil(torch.log2((groups.abs().amax(2) / 6).clamp_min(eps))))
    scaled = (groups * (1 / scale).unsqueeze(2)).clamp(-6, 6)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = ((scaled.abs().unsqueeze(3) > middles).sum(3) | (scaled < 0).int() << 3).view(len(x), -1, 2)
    output_q.copy_(codes[:, :, 0] | codes[:, :, 1] << 4)
    output_s.copy_(scale)


def mm_mxfp4_out_marlin(out, x, weight, scale, group_size):
    """``mm_mxfp4_out_marlin``: words ``[k / 8, n]`` with codes in the order of ``shuffle_weight``, scale
    bytes ``[k / 32, n]``.
    """
    (m, k), n = x.shape, weight.shape[1]
    assert out.dtype is x.dtype is torch.bfloat16, "pointers to other types are read as bfloat16"
    assert (weight.dtype, scale.dtype, group_size) == (torch.int32, torch.uint8, 32)
    assert (out.shape, weight.shape, scale.shape) == ((m, n), (k // 8, n), (k // 32, n))
    assert all(t.is_contiguous() for t in (out, x, weight, scale))
    codes = torch.empty(k, n, dtype=torch.int64)
    for place, original in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        codes[original::8] = weight >> 4 * place & 15
    factors = (scale.short() << 7).view(torch.bfloat16)
    values = E2M1.bfloat16()[codes] * factors.repeat_interleave(32, 0)
    out.copy_(x.float() @ values.float())


def int4_gemm_w4a8(a, a_scale, a_zp, b, b_scale, b_zp, group_size, g_idx, bias):
    """``dnnl_matmul_w4a8_int4`` with signed activations; one scale for all of A, or one for each row. Returns
    fp16.
    """
    (m, k), n = a.shape, b.shape[1]
    assert a.numel()
    assert a.dtype is torch.int8
    assert g_idx is None
    assert n % 8 == 0, "as vLLM's XPUW4A8IntLinearKernel asks"
    assert b.stride(0) == 1, "words lie along K"
    assert a_scale.dtype is b_scale.dtype is torch.float16, "other scales are read as fp16"
    assert a_zp.dtype is torch.int32
    assert a_scale.shape == a_zp.shape
    assert a_scale.shape in ((1,), (m, 1))
    assert (b_zp.shape, b_zp.dtype) == ((1,), torch.int8)
    assert b_scale.shape == (k // group_size, n)
    assert b_scale.is_contiguous()
    values = (a.float() - a_zp.view(-1, 1)) * a_scale.float().view(-1, 1)
    weight = (u4(b.t(), k) - b_zp) * b_scale.float().t().repeat_interleave(group_size, 1)
    y = values @ weight.t()
    return (y if bias is None else y + bias.float()).half()


CPU_INT8 = torch.ops.aten._weight_int8pack_mm


def int8pack_mm(*args: Tensor, **kwargs: Tensor) -> Tensor:
    """``_weight_int8pack_mm_xpu``, which reads scales in fp32; the CPU needs them in the dtype of x, and K %
    16 == 0.

    The call is first made unchanged, without data, to the operator of ATen.
    """
    CPU_INT8(*(t.to("meta") for t in args), **{name: t.to("meta") for name, t in kwargs.items()})
    x, mat2, scales = args
    assert x.numel(), "oneDNN multiplies no empty matrices"
    assert x.stride(1) == 1
    assert mat2.is_contiguous()
    assert scales.shape == mat2.shape[:1]
    assert scales.dtype is torch.float32
    y = (
        CPU_INT8(x.float(), mat2, torch.ones_like(scales))
        if x.shape[1] % 16 == 0
        else x.float() @ mat2.float().t()
    )
    return (y * scales).to(x.dtype)


int8pack_mm.default = CPU_INT8.default  # torch looks for it where this takes the operator's place
