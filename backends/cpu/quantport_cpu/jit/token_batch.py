"""Runs the experts of one token in one launch: ``token_experts`` called with tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from quantport.backend import ACTIVATIONS, Packed, once
from quantport_cpu.jit import gemm_int8, int4_batch, token_experts
from quantport_cpu.jit.few_rows import SPAN
from quantport_cpu.jit.grouped_small_batch import HALF_RANGE
from quantport_cpu.jit.int4_batch import Int4, Layout
from quantport_cpu.jit.memory import Array, array, integers
from quantport_cpu.jit.parallel_for import Kernel, threads_for
from quantport_cpu.jit.small_batch import ONE, scales_of_128_blocks


class Token(NamedTuple):
    """One token and its experts.

    Attributes:
        x: bf16 ``[1, hidden]``, contiguous.
        experts: The experts.
        weights: bf16 ``[1, top_k]``, contiguous, as many.
        wide: Columns between gate or up and down.
        activation: A name in ``ACTIVATIONS``.
    """

    x: Tensor
    experts: Sequence[int]
    weights: Tensor
    wide: int
    activation: str


@once
def activation_table(name: str) -> Tensor:
    """What an activation function makes of every bf16, by its bits: bf16 ``[65536]``."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        bits = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16)
        return ACTIVATIONS[name](bits.view(torch.bfloat16))


def int8(token: Token, gate_up: Packed, down: Packed) -> Tensor:
    """int8 weights and activations.

    Args:
        token: The token.
        gate_up: int8 codes ``[experts, 2, wide, hidden]``, and fp32 scales ``[experts, 2, wide or 1, 1]``.
        down: The same of ``[experts, 1, hidden, wide]``.

    Returns:
        bf16 ``[1, hidden]``.
    """
    words = [word for codes, scale in (gate_up, down) for word in _with_channels(codes, scale, torch.int8)]
    step, row_bytes = _step(gate_up, down), gemm_int8.activation_bytes() * _longest(token)
    stride = row_bytes + token_experts.MULTIPLE
    return _run(token_experts.int8_kernel(), token, row_bytes, *words, step, stride, HALF_RANGE)


def codes_of_a_byte(token: Token, gate_up: Packed, down: Packed, n_format: int, has_blocks: bool) -> Tensor:
    """Weights of a byte in a format of ``gemv_bytes``, and 16-bit activations; arguments as for ``int8``.

    Scales are those of channels, or, where ``has_blocks``, of 128x128 blocks: fp32 ``[experts, 2 or 1,
    ceil(N/128), ceil(K/128)]``.
    """
    dtype, words = (torch.uint8, torch.int8)[n_format], list[Array | int]()
    for codes, scale in (gate_up, down):
        if has_blocks:
            *several, n, k = codes.shape
            blocks, _, row, _ = scales_of_128_blocks(scale, *several, n, k)
            words += [array(codes, dtype, *codes.shape), blocks, -(-n // 128) * row, ONE, 0]
        else:
            weights, channels, each = _with_channels(codes, scale, dtype)
            words += [weights, ONE, 0, channels, each]
    step, row_bytes = 0 if has_blocks else _step(gate_up, down), 4 * _longest(token)
    return _run(token_experts.bytes_kernel(n_format), token, row_bytes, *words, step, row_bytes)


def int4(token: Token, gate_up: Int4, down: Int4, layout: Layout, digits: int) -> Tensor:
    """int4 weights, and activations as integers of so many digits; arguments as for ``int8``."""
    hidden, stride, words = token.x.shape[1], 0, list[Array | int]()
    for weight, k in ((gate_up, hidden), (down, token.wide)):
        row_bytes, sums_at = int4_batch.row_bytes(k, layout, digits)
        words += [*weight.arrays(k, layout), sums_at]
        stride = max(stride, row_bytes)
    kernel = token_experts.int4_kernel(*layout, digits)
    return _run(kernel, token, stride, *words, stride + token_experts.MULTIPLE, HALF_RANGE)


def _with_channels(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Array, Array, int]:
    """The memory of weights and of the scales of their channels, and bytes of the latter of a weight."""
    *several, _, _ = codes.shape
    each = scale.shape[-2]
    return array(codes, dtype, *codes.shape), array(scale, torch.float32, *several, each, 1), 4 * each


def _step(*parts: Packed) -> int:
    """Bytes from the scale of a channel to the next."""
    return 4 if max(scale.shape[-2] for _, scale in parts) > 1 else 0


def _longest(token: Token) -> int:
    """Columns of the longest row of activations, with its padding."""
    multiple = token_experts.MULTIPLE
    return -(-max(token.x.shape[1], token.wide) // multiple) * multiple


def _run(kernel: Kernel, token: Token, row_bytes: int, *words: Array | int) -> Tensor:
    x, wide, top_k, hidden = token.x, token.wide, len(token.experts), token.x.shape[1]
    out, between = x.new_empty(1, hidden), x.new_empty(top_k, wide)
    kernel(
        -(-wide // SPAN) * top_k + -(-hidden // SPAN),
        integers(token.experts),
        top_k,
        array(token.weights, torch.bfloat16, 1, top_k),
        array(x, torch.bfloat16, 1, hidden),
        hidden,
        wide,
        array(activation_table(token.activation), torch.bfloat16, 1 << 16),
        array(between, torch.bfloat16, top_k, wide),
        array(out, torch.bfloat16, 1, hidden),
        *words,
        threads=threads_for(3 * top_k * hidden * wide),
        slot=token_experts.slot_bytes(_longest(token), top_k, row_bytes),
    )
    return out
