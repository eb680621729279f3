"""Matrix multiplications of CANN on the host, from Ascend/op-plugin docs/zh/custom_APIs/torch_npu and
hicann/ops-nn matmul/*/docs.

Sums are in fp32 (for integers in fp64, which is exact), and a result is rounded once. Only the combinations
in the vendor's tables are accepted.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from simulator.memory import NZ, PLAIN, check, layout, matrix, over, place, read_nz
from simulator.quantize import HALVES, powers
from simulator.register import A2, A3, A5, E2M1, E8M0, I310, OUTPUTS, allowed, family, operator
from torch import Tensor

LIMIT = 65535
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTES = (torch.uint8, torch.int8)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Codes ``[..., k]`` of bytes ``[..., k / 2]``, the low half first."""
    return np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)


def e2m1(packed: Tensor) -> np.ndarray:
    """Values of a host tensor of packed e2m1."""
    return (
        nibbles(packed.contiguous().view(torch.uint8).numpy())
        .view(ml_dtypes.float4_e2m1fn)
        .astype(np.float32)
    )


def e2m1_columns(packed: Tensor) -> np.ndarray:
    """Values ``[k, n]`` of bytes ``[k / 2, n]``, which are packed along k."""
    return e2m1(packed.t()).T


def int4(packed: Tensor) -> np.ndarray:
    """Values ``[..., n]`` of int32 words ``[..., n / 8]``, the low bits first."""
    codes = nibbles(packed.contiguous().numpy().view(np.uint8)).astype(np.int8)
    return np.where(codes > 7, codes - 16, codes).astype(np.float32)


def _out(y: np.ndarray, dtype: torch.dtype) -> Tensor:
    return place(torch.from_numpy(np.ascontiguousarray(y.astype(np.float32))).to(dtype))


def _bias(name: str, bias: Tensor | None, n: int, dtypes: tuple[torch.dtype, ...]) -> np.ndarray | float:
    if bias is None:
        return 0.0
    check(
        bias.shape in ((n,), (1, n)) and bias.is_contiguous(),
        name,
        f"a bias of [{n}], not {list(bias.shape)}",
    )
    allowed(name, "the dtype of the bias", bias.dtype, dtypes)
    return over(bias).float().numpy().reshape(1, n)


@operator(I310, A2, A3, A5)
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    name = "npu_quant_matmul"
    check(
        x1.dim() == x2.dim() == 2 and x1.is_contiguous() and x1.numel() and x2.numel(), name, "two matrices"
    )
    check(x1.shape[1] <= LIMIT and x2.shape[1] <= LIMIT, name, f"last dimensions up to {LIMIT}")
    check(offset is y_scale is None, name, "offset and y_scale are not simulated")
    check(pertoken_scale is not None and family() != I310, name, "per-token scales, which the 310P has not")
    allowed(name, "output_dtype", output_dtype, tuple(OUTPUTS))
    dtypes, mx = (x1_dtype, x2_dtype), (scale_dtype, pertoken_scale_dtype) == (E8M0, E8M0)
    check(mx or (scale_dtype is pertoken_scale_dtype is None), name, "scales both of e8m0, or neither")
    operands = (x1, x2, scale, pertoken_scale)
    if mx:
        y = _mx(name, *operands, dtypes, group_sizes)
    else:
        check(dtypes == (None, None), name, "x1_dtype and x2_dtype are for MX")
        check(scale.dtype is pertoken_scale.dtype is torch.float32, name, "fp32 scales are simulated")
        y = _blocks(name, *operands, group_sizes) if group_sizes else _rows(name, *operands)
    halves = (torch.float32, torch.bfloat16) if x1.dtype is torch.int8 else (torch.float32,)
    return _out(y + _bias(name, bias, y.shape[1], halves), OUTPUTS[output_dtype])


def _rows(name: str, x1: Tensor, x2: Tensor, scale: Tensor, token: Tensor) -> np.ndarray:
    """A scale for each row and each column: int8 everywhere, fp8 on the 950."""
    n = x2.shape[1]
    takes = (torch.int8, *FLOAT8) if family() == A5 else (torch.int8,)
    check(x1.dtype is x2.dtype and x1.dtype in takes, name, f"{x1.dtype} x {x2.dtype}")
    check(x1.shape[1] == x2.shape[0], name, f"{list(x1.shape)} x {list(x2.shape)}")
    check(
        token.shape == (x1.shape[0],) and scale.shape in ((1,), (n,)),
        name,
        f"scales {list(token.shape)}, {list(scale.shape)}",
    )
    a, b = over(x1).double().numpy(), matrix(x2).double().numpy()
    return (a @ b).astype(np.float32) * over(scale).numpy()[None] * over(token).numpy()[:, None]


def _blocks(name: str, x1: Tensor, x2: Tensor, scale: Tensor, token: Tensor, sizes: list[int]) -> np.ndarray:
    """Blocks of 1x128 times blocks of 128x128: fp8 on the 950."""
    (m, k), n = x1.shape, x2.shape[1]
    check(
        family() == A5 and x1.dtype is x2.dtype and x1.dtype in FLOAT8,
        name,
        f"{x1.dtype} x {x2.dtype} in blocks",
    )
    check(list(sizes) == [1, 128, 128] and x2.shape[0] == k, name, f"group_sizes {sizes} of {list(x2.shape)}")
    shapes = (-(-k // 128), -(-n // 128))
    check(
        token.shape == (m, shapes[0]) and scale.shape == shapes,
        name,
        f"scales {list(token.shape)}, {list(scale.shape)}",
    )
    left = over(x1).float().numpy() * np.repeat(over(token).numpy(), 128, 1)[:, :k]
    right = matrix(x2).float().numpy() * np.repeat(np.repeat(over(scale).numpy(), 128, 0), 128, 1)[:k, :n]
    return left @ right


def _mx(
    name: str,
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    token: Tensor,
    dtypes: tuple[int | None, int | None],
    sizes: list[int] | None,
) -> np.ndarray:
    """A power-of-two scale for each 32 along K, on the 950: fp8, e2m1, or fp8 times e2m1."""
    check(family() == A5, name, f"no MX on {family()}")
    four, eight = dtypes == (E2M1, E2M1), dtypes == (None, None)
    mixed = dtypes == (None, E2M1)
    check(four or eight or mixed, name, f"dtypes {dtypes}")
    check(list(sizes or ()) == ([0, 0, 32] if mixed else [1, 1, 32]), name, f"group_sizes {sizes}")
    check((x1.dtype in BYTES) if four else x1.dtype in FLOAT8, name, f"x1 of {x1.dtype}")
    check(x2.dtype in (FLOAT8 if eight else BYTES) and layout(x2) in PLAIN, name, f"x2 of {x2.dtype}")
    check(x2.stride(0) == 1 or eight, name, "e2m1 weights are packed along K: [N, K / 2], transposed")
    left = e2m1(over(x1)) if four else over(x1).float().numpy()
    right = over(x2).float().numpy() if eight else e2m1_columns(over(x2))
    (m, k), n = left.shape, right.shape[1]
    check(not four or k > 2, name, "K of MXFP4 is more than 2")
    check(not mixed or k % 8 == 0, name, f"K of W4A8 is a multiple of 8, not {k}")
    pairs = -(-k // 64)
    check(right.shape[0] == k, name, f"[{m}, {k}] x {list(right.shape)}")
    check(token.dtype is scale.dtype is torch.uint8, name, "scales are bytes")
    check(
        token.shape == (m, pairs, 2) and scale.shape == (pairs, n, 2),
        name,
        f"scales {list(token.shape)}, {list(scale.shape)}",
    )
    by_token = powers(over(token).reshape(m, -1).numpy())
    by_channel = powers(over(scale).permute(1, 0, 2).reshape(n, -1).numpy()).T
    return (left * np.repeat(by_token, 32, 1)[:, :k]) @ (right * np.repeat(by_channel, 32, 0)[:k])


@operator(A5)
def npu_dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    *,
    bias: Tensor | None = None,
    output_dtype: int = 15,
) -> Tensor:
    name = "npu_dual_level_quant_matmul"
    check(layout(x2) == NZ and x2.dtype is torch.int8, name, "x2 must be int8 of format FRACTAL_NZ")
    check(x1.dtype in BYTES and x1.numel(), name, "x1 must be bytes")
    scales = (x1_level0_scale, x2_level0_scale, x1_level1_scale, x2_level1_scale)
    check(all(t.is_contiguous() for t in (x1, *scales)), name, "tensors must be contiguous")
    allowed(name, "output_dtype", output_dtype, tuple(OUTPUTS))
    left, right = e2m1(over(x1)), e2m1(read_nz(x2))
    (m, k), n = left.shape, right.shape[0]
    check(right.shape[1] == k, name, f"x1 of {list(left.shape)}, x2 of {list(right.shape)}")
    shapes = ((m, -(-k // 512)), (-(-k // 512), n), (m, -(-k // 64), 2), (n, -(-k // 64), 2))
    check(
        tuple(tuple(s.shape) for s in scales) == shapes,
        name,
        f"scales of {[list(s.shape) for s in scales]}, not {shapes}",
    )
    check(
        [s.dtype for s in scales] == [torch.float32] * 2 + [torch.uint8] * 2, name, "scales of fp32 and e8m0"
    )
    left = left * np.repeat(powers(over(scales[2]).reshape(m, -1).numpy()), 32, 1)[:, :k]
    right = right * np.repeat(powers(over(scales[3]).reshape(n, -1).numpy()), 32, 1)[:, :k]
    y = np.zeros((m, n), np.float32)
    for i, (a, b) in enumerate(zip(over(scales[0]).numpy().T, over(scales[1]).numpy(), strict=True)):
        part = slice(512 * i, 512 * (i + 1))
        y += left[:, part] @ right[:, part].T * a[:, None] * b[None]
    return _out(y + _bias(name, bias, n, (torch.float32,)), OUTPUTS[output_dtype])


@operator(I310, A2, A3, A5)
def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    name = "npu_weight_quant_batchmatmul"
    check(
        x.dtype in HALVES and x.dim() == weight.dim() == 2 and x.numel(),
        name,
        "a matrix of 16-bit activations",
    )
    check(quant_scale is quant_offset is None and not inner_precise, name, "not simulated")
    check(layout(weight) in PLAIN, name, "weights of format FRACTAL_NZ run in graph mode only")
    fp8 = weight.dtype is torch.float8_e4m3fn
    check(weight.dtype in (torch.int8, torch.int32) or fp8, name, f"weights of {weight.dtype}")
    check(
        weight_dtype is None and (not fp8 or family() == A5), name, f"weights of {weight.dtype} on {family()}"
    )
    old = x.dtype is torch.float16 and weight.dtype is torch.int8
    check(old or family() != I310, name, "the 310P takes fp16 activations and int8 weights")
    check(antiquant_scale.dtype is x.dtype, name, f"scales of the dtype of x, not {antiquant_scale.dtype}")
    if weight.dtype is torch.int32:
        check(weight.is_contiguous(), name, "int4 weights [K, N / 8] are simulated")
        codes = int4(over(weight))
    else:
        codes = over(weight).float().numpy()
    (k, n), group = codes.shape, antiquant_group_size
    check(x.shape[1] == k and max(k, n) <= LIMIT, name, f"{list(x.shape)} x {[k, n]}; K and N up to {LIMIT}")
    check(
        not group or (group % 32 == 0 and 32 <= group <= k - 1),
        name,
        f"groups of 32 to K - 1, not of {group}",
    )
    check(
        not fp8 or (not group and antiquant_offset is None),
        name,
        "fp8 has one scale for each channel, and no offsets",
    )
    shapes = ((-(-k // group), n),) if group else ((1, n), (n,), *(() if fp8 else ((1,), (1, 1))))
    allowed(name, "the shape of the scales", tuple(antiquant_scale.shape), shapes)
    if antiquant_offset is not None:
        same = (antiquant_offset.shape, antiquant_offset.dtype) == (
            antiquant_scale.shape,
            antiquant_scale.dtype,
        )
        check(
            same,
            name,
            f"offsets as the scales, not {list(antiquant_offset.shape)} of {antiquant_offset.dtype}",
        )
        codes = codes + _spread(antiquant_offset, group, k)
    y = over(x).float().numpy() @ (codes * _spread(antiquant_scale, group, k))
    return _out(y + _bias(name, bias, n, _biases(x.dtype, fp8)), x.dtype)


def _spread(values: Tensor, group: int, k: int) -> np.ndarray:
    """Scales or offsets of weight-only products, repeated over their groups along K."""
    rows = over(values).float().numpy()
    return np.repeat(rows, group, 0)[:k] if group else rows.reshape(1, -1)


def _biases(dtype: torch.dtype, fp8: bool) -> tuple[torch.dtype, ...]:
    """Allowed dtypes of the bias of weight-only products: for fp8 that of x; else fp32 for bf16, and on the
    950 also that of x.
    """
    if fp8 or dtype is torch.float16:
        return (dtype,)
    return (torch.float32, dtype) if family() == A5 else (torch.float32,)
