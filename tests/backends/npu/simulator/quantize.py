"""Quantization operators of CANN on the host, from Ascend/op-plugin docs/zh/custom_APIs/torch_npu and
hicann/ops-nn quant/*/docs.

The arithmetic is that of numpy and ml_dtypes, so that it checks quantport's own numerics and does not repeat
them.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
import torch_npu
from simulator.memory import NZ, PLAIN, check, layout, lies, matrix, over, place, to_nz
from simulator.register import A2, A3, A5, E2M1, ELEMENTS, I310, allowed, family, operator
from torch import Tensor

MAXIMA = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
FLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
TORCH = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
EMAX = {"e4m3": 8, "e5m2": 15, "e2m1": 2}
HALVES = (torch.float16, torch.bfloat16)


def numbers(tensor: Tensor) -> np.ndarray:
    """The values of an NPU tensor in fp32."""
    return over(tensor).float().numpy()


def cast(values: np.ndarray, element: str) -> np.ndarray:
    """Rounds to nearest even and saturates; NaN, of a block of zeros, becomes 0. One byte for each code."""
    values = np.nan_to_num(
        values.astype(np.float32), nan=0.0, posinf=MAXIMA[element], neginf=-MAXIMA[element]
    )
    values = np.clip(values, -MAXIMA[element], MAXIMA[element])
    return (
        np.rint(values).astype(np.int8)
        if element in ("int8", "int4")
        else values.astype(FLOATS[element]).view(np.uint8)
    )


def _tensor(codes: np.ndarray, element: str) -> Tensor:
    codes = np.ascontiguousarray(codes)
    if element == "int4":
        return place(torch.from_numpy(pairs(pairs(pairs(codes.view(np.uint8), 4), 8), 16).view(np.int32)))
    if element == "e2m1":
        return place(torch.from_numpy(pairs(codes, 4)))
    return place(torch.from_numpy(codes).view(TORCH[element]))


def pairs(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs two codes of ``bits`` bits into a number of twice as many, the first in the low half."""
    wide = {4: np.uint8, 8: np.uint16, 16: np.uint32}[bits]
    low, high = codes[..., 0::2].astype(wide), codes[..., 1::2].astype(wide)
    mask = wide((1 << bits) - 1)
    return (low & mask) | ((high & mask) << wide(bits))


def exponents(amax: np.ndarray, element: str, algorithm: int, most: float) -> np.ndarray:
    """e8m0 bytes of MX blocks (``aclnnDynamicMxQuantV2``): mode 0 floors, 1 rounds amax / max up, 2 rounds by
    the mantissa of amax.
    """
    bits = amax.astype(np.float32).view(np.uint32)
    exponent, mantissa = (bits >> 23).astype(np.int64), bits & 0x7FFFFF
    if algorithm == 0:
        out = exponent - EMAX[element]
    elif algorithm == 1 or most not in (0.0, 6.0, 7.0):
        ratio = (amax / np.float32(most or MAXIMA[element])).astype(np.float32).view(np.uint32)
        out = (ratio >> 23).astype(np.int64) + ((ratio & 0x7FFFFF) > 0)
    else:
        top = mantissa >> 21 == 3 if most == 7.0 else mantissa >> 22 == 1
        out = exponent - 2 + top
    return np.clip(out, 0, 254).astype(np.uint8)


def powers(scale: np.ndarray) -> np.ndarray:
    """Values of e8m0 bytes."""
    return scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def grouped(values: np.ndarray, size: int) -> np.ndarray:
    """``[..., k]`` as ``[..., groups, size]``, padded with zeros."""
    fill = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % size)]
    return np.pad(values, fill).reshape(*values.shape[:-1], -1, size)


def even(scale: np.ndarray) -> np.ndarray:
    """Scales ``[..., g]`` as ``[..., ceil(g / 2), 2]``, padded with zeros."""
    return grouped(scale, 2)


def _takes(name: str, x: Tensor, least: int = 2) -> None:
    check(x.dtype in HALVES, name, f"the input may be float16 or bfloat16, not {x.dtype}")
    check(x.dim() >= least, name, f"the input has {x.dim()} dimensions")


@operator(A2, A3, A5)
def npu_dynamic_quant(
    source: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _takes("npu_dynamic_quant", source)
    allowed(
        "npu_dynamic_quant", "dst_type", dst_type, (None, 1, 16, 23, 24) if family() == A5 else (None, 1, 16)
    )
    allowed("npu_dynamic_quant", "quant_mode", quant_mode, ("pertoken",))
    check(
        smooth_scales is group_index is None and not dst_type_max,
        "npu_dynamic_quant",
        "smoothing is not simulated",
    )
    element, x = ELEMENTS[dst_type], numbers(source)
    scale = np.abs(x).max(-1) / np.float32(MAXIMA[element])
    with np.errstate(all="ignore"):
        codes = cast(x / scale[..., None], element)
    return _tensor(codes, element), place(torch.from_numpy(scale))


@operator(A2, A3, A5)
def npu_dynamic_block_quant(
    x: Tensor,
    *,
    min_scale: float = 0.0,
    round_mode: str = "rint",
    dst_type: int = 1,
    row_block_size: int = 1,
    col_block_size: int = 128,
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    name = "npu_dynamic_block_quant"
    _takes(name, x)
    allowed(name, "dst_type", dst_type, (1, 23, 24, 291, 292) if family() == A5 else (1,))
    allowed(name, "round_mode", round_mode, ("rint",))
    allowed(name, "row_block_size", row_block_size, (1,))
    allowed(name, "col_block_size", col_block_size, (64, 128, 192, 256) if family() == A5 else (1, 128))
    check(x.dim() == 2 and not dst_type_max and x.numel(), name, "a matrix that is not empty")
    element = ELEMENTS[dst_type]
    blocks = grouped(numbers(x), col_block_size)
    scale = np.abs(blocks).max(-1) / np.float32(MAXIMA[element])
    scale = np.minimum(scale, np.float32(1 / min_scale)) if min_scale else scale
    with np.errstate(all="ignore"):
        codes = cast(blocks / scale[..., None], element)
    return _tensor(codes.reshape(x.shape[0], -1)[:, : x.shape[1]], element), place(torch.from_numpy(scale))


@operator(A5)
def npu_dynamic_mx_quant(
    source: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = E2M1,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    name = "npu_dynamic_mx_quant"
    _takes(name, source, 1)
    allowed(name, "dst_type", dst_type, (23, 24, 291, 292, E2M1))
    element = ELEMENTS[dst_type]
    allowed(name, "axis", axis, (-1, source.dim() - 1))
    allowed(name, "round_mode", round_mode, ("rint",))
    allowed(name, "block_size", block_size, (32,))
    allowed(name, "scale_alg", scale_alg, (0, 2) if element == "e2m1" else (0, 1))
    check(
        not dst_type_max or (scale_alg == 2 and 6 <= dst_type_max <= 12), name, f"dst_type_max {dst_type_max}"
    )
    check(not max_low_bound, name, "max_low_bound is not simulated")
    blocks = grouped(numbers(source), 32)
    scale = exponents(np.abs(blocks).max(-1), element, scale_alg or 0, dst_type_max)
    codes = cast(blocks / powers(scale)[..., None], element).reshape(*source.shape[:-1], -1)[
        ..., : source.shape[-1]
    ]
    return _tensor(codes, element), place(torch.from_numpy(even(scale)))


@operator(A5)
def npu_dynamic_dual_level_mx_quant(
    source: Tensor, *, smooth_scale: Tensor | None = None, round_mode: str = "rint"
) -> tuple[Tensor, Tensor, Tensor]:
    name = "npu_dynamic_dual_level_mx_quant"
    _takes(name, source, 1)
    allowed(name, "round_mode", round_mode, ("rint",))
    check(smooth_scale is None, name, "smooth_scale must be left out")
    outer = grouped(numbers(source), 512)
    level0 = np.abs(outer).max(-1) / np.float32(6)
    with np.errstate(all="ignore"):
        divided = torch.from_numpy(np.nan_to_num(outer / level0[..., None])).to(source.dtype).float().numpy()
    blocks = grouped(divided.reshape(*source.shape[:-1], -1)[..., : source.shape[-1]], 32)
    level1 = exponents(np.abs(blocks).max(-1), "e2m1", 0, 0.0)
    codes = cast(blocks / powers(level1)[..., None], "e2m1").reshape(*source.shape[:-1], -1)[
        ..., : source.shape[-1]
    ]
    return _tensor(codes, "e2m1"), place(torch.from_numpy(level0)), place(torch.from_numpy(even(level1)))


@operator(I310, A2, A3, A5)
def npu_format_cast(
    source: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    name = "npu_format_cast"
    allowed(name, "acl_format", acl_format, (*PLAIN, NZ))
    check(customize_dtype in (None, 1) and input_dtype is None, name, "other dtypes are not simulated")
    if acl_format == layout(source) or (acl_format in PLAIN and layout(source) in PLAIN):
        return source
    allows = torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT") == b"enable"
    # op_plugin/ops/aclops/FormatCastKernelNpu.cpp, before CANN 9.1
    if acl_format == NZ and family() != A5 and not allows:
        return source
    check(source.dim() == 2 and source.is_contiguous(), name, "a contiguous matrix is simulated")
    out = torch_npu.empty_with_format(
        list(source.shape), dtype=source.dtype, device=source.device, acl_format=acl_format
    )
    if acl_format == NZ:
        tiles = to_nz(over(source)).view(torch.uint8).flatten()
        lies(out)[: len(tiles)] = tiles
    else:
        over(out).copy_(matrix(source))
    return out


@operator(A2, A3, A5)
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    name = "npu_convert_weight_to_int4pack"
    check(
        weight.dtype is torch.int32 and weight.dim() == 2 and weight.is_contiguous(),
        name,
        "a contiguous int32 matrix",
    )
    check(weight.shape[1] % 8 == 0 and not inner_k_tiles, name, "the last dimension must be a multiple of 8")
    codes = over(weight).numpy()
    check(codes.size == 0 or (codes.min() >= -8 and codes.max() <= 7), name, "values must be -8 to 7")
    return _tensor(codes.astype(np.int8), "int4")
