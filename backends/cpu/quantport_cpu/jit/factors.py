"""Scales and offsets of groups as they are stored, in bf16, fp16 or fp32, read as fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantport_cpu.jit.simd import F16, F32, I16, I32, Simd, Value

FP32, FP16, BF16 = range(3)  # as compiled code has them
BYTES = (4, 2, 2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def load(simd: Simd, n_factor: int, lanes: int, address: Value) -> Value:
    """A vector of them."""
    if n_factor == BF16:
        return simd.load_bf16(lanes, address)
    loaded = simd.load(F16 if n_factor == FP16 else F32, lanes, address)
    return simd.half_to_float(loaded) if n_factor == FP16 else loaded


def spread(simd: Simd, n_factor: int, count: int, address: Value, order: Sequence[int]) -> Value:
    """Of ``count`` that lie at an address, those that ``order`` names: a vector as long as it."""
    if n_factor != BF16:
        loaded = load(simd, n_factor, count, address)
        return simd.shuffle(loaded, loaded, order)
    loaded, twice = simd.load(I16, count, address), [i for i in order for _ in range(2)]
    bits = simd.bitcast(simd.shuffle(loaded, loaded, twice), I32, len(order))
    return simd.bitcast(simd.int_op("shl", bits, 16), F32)
