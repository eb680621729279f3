"""Grouped matrix multiplications of CANN on the host: rows in groups, each by a matrix of its own.

From Ascend/op-plugin at 517f2e7d, docs/zh/custom_APIs/torch_npu/torch_npu-npu_grouped_matmul.md and
torch_npu-npu_grouped_matmul_swiglu_quant_v2.md, and for the 950
test/test_custom_ops/test_npu_grouped_matmul.py. One tensor of
activations, one of weights and one of results are simulated (the documents' single, single, single).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from simulator.memory import NZ, check, layout, over, place
from simulator.multiply import BYTES, FLOAT8, LIMIT, e2m1, int4
from simulator.quantize import HALVES, MAXIMA, TORCH, cast, even, exponents, grouped, powers
from simulator.register import A2, A3, A5, E2M1, E8M0, ELEMENTS, OUTPUTS, allowed, family, operator
from torch import Tensor

FLOAT = 6  # ScalarType


def _transposed(weight: Tensor) -> bool:
    """Whether a weight is transposed, as op-plugin decides it (``is_weight_trans``)."""
    return weight.stride(-2) == 1 and weight.stride(-1) == weight.shape[-2]


def _single(name: str, tensors: list[Tensor] | None, what: str) -> Tensor:
    check(tensors is not None and len(tensors) == 1, name, f"one tensor of {what}")
    assert tensors is not None
    return tensors[0]


def _slices(name: str, ends: Tensor | None, rows: int, groups: int) -> Iterator[slice]:
    """The rows of each group, from cumulative sums."""
    check(
        ends is not None and ends.dtype is torch.int64 and tuple(ends.shape) == (groups,),
        name,
        f"int64 group_list of {groups}",
    )
    assert ends is not None
    stops = over(ends).tolist()
    check(
        groups <= 1024 and stops == sorted(stops) and stops[0] >= 0 and stops[-1] == rows,
        name,
        f"ends {stops} of {rows} rows",
    )
    return (slice(a, b) for a, b in zip([0, *stops], stops, strict=False))


def _weights(name: str, weight: Tensor, k: int) -> tuple[int, int]:
    check(
        weight.dim() == 3 and layout(weight) != NZ, name, "weights [groups, K, N] whose elements lie in rows"
    )
    check(
        weight.is_contiguous() or _transposed(weight),
        name,
        "weights contiguous, or a transposed view of contiguous ones",
    )
    check(weight.shape[1] == k, name, f"activations of {k}, weights {list(weight.shape)}")
    check(k <= LIMIT and weight.shape[2] <= LIMIT, name, f"last dimensions up to {LIMIT}")
    return weight.shape[0], weight.shape[2]


def _scales(name: str, what: str, scale: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> np.ndarray:
    check(tuple(scale.shape) == shape, name, f"{what} of {list(scale.shape)}, not {list(shape)}")
    allowed(name, f"the dtype of {what}", scale.dtype, dtypes)
    return (over(scale) if scale.dtype is torch.uint8 else over(scale).float()).numpy()


@operator(A2, A3, A5)
def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: Any = None,
    scale: list[Tensor] | None = None,
    offset: Any = None,
    antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: Any = None,
    activation_quant_scale: Any = None,
    activation_quant_offset: Any = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Any = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    name = "npu_grouped_matmul"
    rest = (bias, offset, activation_input, activation_quant_scale, activation_quant_offset, tuning_config)
    check(
        all(value is None for value in rest) and not act_type,
        name,
        "bias, offset and activations are not simulated",
    )
    check(
        split_item in (2, 3) and group_type == 0 and group_list_type == 0,
        name,
        "one result, groups of rows, cumulative sums",
    )
    allowed(name, "output_dtype", output_dtype, tuple(OUTPUTS))
    left, right = _single(name, x, "activations"), _single(name, weight, "weights")
    check(
        left.dim() == 2 and left.is_contiguous() and left.numel(),
        name,
        "a contiguous matrix that is not empty",
    )
    if antiquant_scale is not None:
        check(scale is per_token_scale is None, name, "scales of weights, or scales of both")
        multiply = _antiquant(name, left, right, antiquant_scale, antiquant_offset, output_dtype)
    else:
        dtypes = (x_dtype, weight_dtype, scale_dtype, per_token_scale_dtype)
        scales = _single(name, scale, "scales"), _single(name, per_token_scale, "scales of tokens")
        by = _mx if scale_dtype is not None else _per_token
        multiply = by(name, left, right, *scales, dtypes, OUTPUTS[output_dtype])
    rows = enumerate(_slices(name, group_list, len(left), right.shape[0]))
    y = np.concatenate([multiply(g, own) for g, own in rows])
    return [place(torch.from_numpy(y).to(OUTPUTS[output_dtype]))]


Multiply = Callable[[int, slice], np.ndarray]
Dtypes = tuple[int | None, ...]


def _antiquant(
    name: str,
    x: Tensor,
    weight: Tensor,
    scales: list[Tensor],
    offsets: list[Tensor] | None,
    output: int | None,
) -> Multiply:
    """16-bit activations times ``(weight + offset) * scale``: int8 with scales of channels; int4 with scales
    of channels or of equal groups along K.
    """
    check(family() in (A2, A3), name, f"16-bit activations by integers are not documented for {family()}")
    check(
        x.dtype in HALVES and OUTPUTS.get(output or 0) is x.dtype,
        name,
        f"results of the dtype of the activations, {x.dtype}",
    )
    allowed(name, "the dtype of weights", weight.dtype, (torch.int8, torch.int32))
    if weight.dtype is torch.int32:
        check(weight.is_contiguous(), name, "int4 weights [groups, K, N / 8] are simulated")
        codes = int4(over(weight))
    else:
        codes = over(weight).float().numpy()
    groups, _ = _weights(name, weight, x.shape[1])
    k, n = codes.shape[1:]
    check(n <= LIMIT, name, f"N up to {LIMIT}, not {n}")
    scale = _single(name, scales, "scales")
    parts = scale.shape[1] if scale.dim() == 3 else 0
    check(
        not parts or (weight.dtype is torch.int32 and k % parts == 0),
        name,
        f"{parts} groups along K of {k}: of int4, and whole",
    )
    shape = (groups, parts, n) if parts else (groups, n)
    by, plus = (
        _scales(name, "antiquant", t, shape, x.dtype) for t in (scale, _single(name, offsets, "offsets"))
    )
    spread = [np.repeat(t, k // parts, 1) if parts else t[:, None] for t in (by, plus)]
    values = (codes + spread[1]) * spread[0]
    return lambda g, own: over(x)[own].float().numpy() @ values[g]


def _per_token(
    name: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    token: Tensor,
    dtypes: Dtypes,
    output: torch.dtype | None,
) -> Multiply:
    """A scale for each row and each column: int8, and on the 950 fp8. For int8, a bf16 result needs scales in
    bf16, an fp16 result scales in fp32.
    """
    check(dtypes == (None,) * 4, name, "dtypes of MX")
    takes = (torch.int8, *FLOAT8) if family() == A5 else (torch.int8,)
    check(x.dtype is weight.dtype and x.dtype in takes, name, f"{x.dtype} x {weight.dtype} on {family()}")
    groups, n = _weights(name, weight, x.shape[1])
    fits = torch.bfloat16 if x.dtype is torch.int8 and output is torch.bfloat16 else torch.float32
    by = _scales(name, "scales", scale, (groups, n), fits)
    tokens = _scales(name, "scales of tokens", token, (len(x),), torch.float32)
    left, right = over(x).double().numpy(), over(weight).double().numpy()
    return lambda g, own: (left[own] @ right[g]).astype(np.float32) * by[g] * tokens[own, None]


def _mx(
    name: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    token: Tensor,
    dtypes: Dtypes,
    output: torch.dtype | None,
) -> Multiply:
    """A power-of-two scale for each 32 along K, on the 950: fp8 or e2m1."""
    check(family() == A5, name, f"no MX on {family()}")
    four = dtypes == (E2M1, E2M1, E8M0, E8M0)
    check(four or dtypes == (None, None, E8M0, E8M0), name, f"dtypes {dtypes}")
    allowed(name, "the dtype of activations and weights", x.dtype, BYTES if four else FLOAT8)
    allowed(name, "the dtype of activations and weights", weight.dtype, BYTES if four else FLOAT8)
    check(
        not four or _transposed(weight),
        name,
        "e2m1 weights are packed along K: [groups, N, K / 2], transposed",
    )
    groups, n = _weights(name, weight, x.shape[1])
    check(not four or x.shape[1] > 1, name, "K of MXFP4 is not 2 (GroupedMatmulKernelNpuOpApi.cpp)")
    left = e2m1(over(x)) if four else over(x).float().numpy()
    right = e2m1(over(weight).transpose(1, 2)).transpose(0, 2, 1) if four else over(weight).float().numpy()
    k = left.shape[1]
    half = -(-k // 64)
    by = (
        _scales(name, "scales", scale, (groups, half, n, 2), torch.uint8)
        .transpose(0, 2, 1, 3)
        .reshape(groups, n, -1)
    )
    tokens = _scales(name, "scales of tokens", token, (len(x), half, 2), torch.uint8).reshape(len(x), -1)
    left = left * np.repeat(powers(tokens), 32, 1)[:, :k]
    right = right * np.repeat(powers(np.ascontiguousarray(by)), 32, 2)[..., :k].transpose(0, 2, 1)
    return lambda g, own: left[own] @ right[g]


@operator(A5)
def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: list[Tensor],
    weight_scale: list[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Any = None,
    weight_assist_matrix: Any = None,
    bias: Any = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: Any = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator of the 950; other chips take A8W8 in FRACTAL_NZ, which is not simulated. Exponents of
    results are floored, as elsewhere.
    """
    name = "npu_grouped_matmul_swiglu_quant_v2"
    check(
        smooth_scale is weight_assist_matrix is bias is tuning_config is None, name, "no smoothing, no bias"
    )
    check((dequant_dtype, group_list_type) == (FLOAT, 0), name, "products in fp32, cumulative sums")
    check(x_dtype is weight_dtype is None, name, "MXFP4 is not simulated")
    right, scale = _single(name, weight, "weights"), _single(name, weight_scale, "scales")
    mx = (weight_scale_dtype, x_scale_dtype) == (E8M0, E8M0)
    check(
        (dequant_mode, quant_mode) == ((2, 2) if mx else (0, 0)), name, f"modes {dequant_mode}, {quant_mode}"
    )
    element = ELEMENTS.get(quant_dtype)
    check(TORCH.get(element) is x.dtype, name, f"results of {quant_dtype} for activations of {x.dtype}")
    check(not mx or right.shape[2] % 128 == 0, name, f"N in multiples of 128 for MX, not {right.shape[2]}")
    if mx:
        multiply = _mx(name, x, right, scale, x_scale, (None, None, E8M0, E8M0), None)
    else:
        multiply = _per_token(name, x, right, scale, x_scale, (None,) * 4, None)
    y = np.concatenate(
        [multiply(g, own) for g, own in enumerate(_slices(name, group_list, len(x), right.shape[0]))]
    )
    act, gate = np.split(y, 2, 1)
    hidden = (act / (1 + np.exp(-act)) * gate).astype(np.float32)
    if not mx:
        scales = np.abs(hidden).max(1) / np.float32(MAXIMA[element])
        return _codes(cast(hidden / scales[:, None], element), element), place(torch.from_numpy(scales))
    blocks = grouped(hidden, 32)
    shared = exponents(np.abs(blocks).max(-1), element, 0, 0.0)
    codes = cast(blocks / powers(shared)[..., None], element).reshape(len(hidden), -1)[:, : hidden.shape[1]]
    return _codes(codes, element), place(torch.from_numpy(even(shared)))


def _codes(codes: np.ndarray, element: str) -> Tensor:
    return place(torch.from_numpy(np.ascontiguousarray(codes)).view(TORCH[element]))
