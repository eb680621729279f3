"""Tiles of a product ``[M, N]``, and K split into parts where there are few of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantport.backend import Request
from quantport_triton.launch import Config, launch


def split_k(tiles: int, programs: int, steps: int) -> int:
    """Number of parts of K: a power of two, so that few variants are compiled, each of at least four steps.

    Args:
        tiles: Tiles of the product.
        programs: Programs that keep the device busy.
        steps: Steps along K.
    """
    split = 1
    while 2 * split * tiles <= programs and 8 * split <= steps:
        split *= 2
    return split


def unaligned(request: Request) -> str:
    """Why rows of codes are slow to load; '' where rows of x and of W begin at multiples of 16 bytes."""
    scheme, k = request.weight.scheme, request.weight.k
    bits = min(quant.element.bits for quant in (scheme.weight, scheme.activation) if quant)
    return f"codes are loaded one by one: K is {k}, not a multiple of {128 // bits}" if k * bits % 128 else ""


def multiply(
    kernel: Any,
    config: Config,
    y: Tensor,
    k: int,
    tensors: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
    numbers: Mapping[str, int],
    sums: torch.dtype,
    divide: bool,
    **constants: Any,
) -> None:
    """Launches a ``gemm`` of ``ops.scaled`` or ``ops.block_scaled``, and ``add`` where K is split.

    Args:
        kernel: The ``gemm``.
        config: Its configuration; ``PROGRAMS``, where it has that, is the number of programs that keep the
            device busy, up to which K is split.
        y: The output ``[M, N]``.
        k: Columns of both operands.
        tensors: Tensors that only ``gemm`` takes.
        factors: ``token_factor``, ``row_factor`` and ``bias``, which ``store_output`` applies.
        numbers: Integers that only ``gemm`` takes.
        sums: Dtype of the sums over K: int32 where they are exact, else fp32.
        divide: Whether the output is divided by the factors.
        constants: Constants of ``gemm``; ``TOKEN_FACTOR``, ``ROW_STRIDE`` and ``BIAS`` are those of ``add``
            too.
    """
    from quantport_triton.ops import scaled as ops

    (m, n), blocks = y.shape, dict(config.blocks)
    tiles = -(-m // blocks["BM"]) * -(-n // blocks["BN"])
    split = split_k(tiles, blocks.pop("PROGRAMS", 1), -(-k // blocks["BK"]))
    config = Config({**blocks, "SPLIT": split}, config.warps, config.stages)
    out = y if split == 1 else y.new_empty(split, m, n, dtype=sums)
    arguments = {**tensors, **factors, "y": out}
    launch(kernel, (tiles, split), config, arguments, {"M": m, "N": n, "K": k, **numbers}, **constants)
    if split > 1:
        shared = {name: constants[name] for name in ("TOKEN_FACTOR", "ROW_STRIDE", "BIAS")}
        arguments = {"parts": out, **factors, "y": y}
        config = Config({"SPLIT": split, "BN": 256})
        launch(ops.add, (-(-n // 256), m), config, arguments, {"M": m, "N": n}, **shared, DIVIDE=divide)
