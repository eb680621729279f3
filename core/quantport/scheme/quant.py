"""How one operand is quantized, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quantport.scheme.formats import E8M0, FORMATS, Format

SCALES = ("fp32", "fp16", "bf16")  # formats of scales that are numbers, not exponents or codes
RULES = ("floor", "even", "even1", "ceil", "rceil")
SEARCHES = ("mse", "hqq")


@dataclass(frozen=True)
class Quant:
    """How one operand is quantized: a scale per block of elements.

    Attributes:
        format: Name of the element format.
        block_shape: (rows, columns) that share a scale: rows are output channels or tokens, columns lie along
            the inputs; 0 means all of them. A last, shorter block has its own scale.
        scale: Name of the format of the stored scales, which are rounded *before* the codes are computed.
        rule: How a scale follows from its block: ``amax``; a rule of ``quantport.numerics.scales`` for e8m0;
            ``mse`` and ``hqq`` search (``quantport.numerics.search``).
        outer_block: (rows, columns) of the larger blocks that share a second scale, in fp32; None for one
            level.
        zero_point: Whether each block also has an offset, in the dtype of the scales: value = code *
            scale + offset.
        scale_quant: Whether the scales are themselves quantized, to 8 bits.
        static: Of activations: whether the scale is stored, and their offset as an integer: code =
            value / scale + zero point.
    """

    format: str
    block_shape: tuple[int, int]
    scale: str = "fp32"
    rule: str = "amax"
    outer_block: tuple[int, int] | None = None
    zero_point: bool = False
    scale_quant: bool = False
    static: bool = False

    @property
    def group_size(self) -> int:
        """Columns that share a scale; 0 means all of them."""
        return self.block_shape[1]

    @property
    def element(self) -> Format:
        """The element format."""
        return FORMATS[self.format]

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the stored scales; those of e8m0 are the exponent bytes, uint8."""
        return FORMATS[self.scale].storage

    @property
    def unit(self) -> str:
        """What a matrix unit must multiply to run it natively: the element format, or the block format
        (``mxfp4``, ``nvfp4``); ``int8`` for the codes of GGUF blocks.
        """
        if self.element.block:
            return "int8"
        blocks = {E8M0.name: f"mxfp{self.element.bits}", "e4m3fn": "nvfp4"}
        return blocks.get(self.scale, self.format)

    @property
    def searched(self) -> bool:
        """Whether scales are searched for, and do not follow from amax alone."""
        return self.rule in SEARCHES

    @property
    def plain(self) -> bool:
        """One level of scales from amax, without offsets: 8-bit and integer formats as compressed-tensors has
        them.
        """
        return self == Quant(self.format, self.block_shape, self.scale) and self.scale in SCALES

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales of an [n, k] operand: one per block."""
        return blocks_of(n, k, *self.block_shape)

    def __str__(self) -> str:
        names = {(0, 0): "per tensor", (1, 0): "per row"}
        rows, columns = self.block_shape
        return f"{self.format} {names.get(self.block_shape, f'per {rows}x{columns} block')}"


def blocks_of(n: int, k: int, rows: int, cols: int) -> tuple[int, int]:
    """Number of blocks of ``rows`` x ``cols`` (0: all) that cover an [n, k] matrix, down and across."""
    return math.ceil(n / rows) if rows else 1, math.ceil(k / cols) if cols else 1
