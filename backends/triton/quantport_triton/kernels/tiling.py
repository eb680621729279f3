"""How a product ``[M, N]`` is cut into programs, and K into parts where tiles are few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantport.backend import Request
from quantport_triton.launch import Config, launch


def split_k(tiles: int, programs: int, steps: int) -> int:
    """Over how many programs K is split: a power of two, so that few variants are compiled; each has four
    steps or more.
    """
    split = 1
    while 2 * split * tiles <= programs and 8 * split <= steps:
        split *= 2
    return split


def unaligned(request: Request) -> str:
    """Why rows of codes are slow to load: '' where every row of x and of W starts at a multiple of 16
    bytes.
    """
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
        config: Block sizes; ``PROGRAMS`` is how many keep the device busy: K is split until there are as
            many.
        y: The output ``[M, N]``.
        k: The K of the product.
        tensors: Arguments of ``gemm`` alone.
        factors: What ``store_output`` applies: ``token_factor``, ``row_factor`` and ``bias``.
        numbers: Widths of rows.
        sums: What the sums over K are: int32 where they are exact, else fp32.
        divide: Whether factors divide.
        constants: Constants of ``gemm``; ``TOKEN_FACTOR``, ``ROW_STRIDE`` and ``BIAS`` are those of ``add``
            too.
    """
    from quantport_triton.ops import scaled as ops

    (m, n), blocks = y.shape, dict(config.blocks)
    tiles = -(-m // blocks["BM"]) * -(-n // blocks["BN"])
    split = split_k(tiles, blocks.pop("PROGRAMS", 1), -(-k // blocks["BK"]))
    config = Config({**blocks, "SPLIT": split}, config.warps, config.stages)
    out = y if split == 1 else y.new_empty(split, m, n, dtype=sums)
    launch(
        kernel,
        (tiles, split),
        config,
        {**tensors, **factors, "y": out},
        {"M": m, "N": n, "K": k, **numbers},
        **constants,
    )
    if split > 1:
        same = {name: constants[name] for name in ("TOKEN_FACTOR", "ROW_STRIDE", "BIAS")}
        config = Config({"SPLIT": split, "BN": 256})
        launch(
            ops.add,
            (-(-n // 256), m),
            config,
            {"parts": out, **factors, "y": y},
            {"M": m, "N": n},
            **same,
            DIVIDE=divide,
        )
