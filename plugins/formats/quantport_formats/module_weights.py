"""The weights of compressed-tensors, ModelOpt and Quark, whose tensors are alike: which scheme holds the
numbers of each, and how they are read.

Codes of fewer bits than a scheme has are held in its codes, E2M3 in E4M3, scales of blocks once for each row
of a block: all of that is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantport.checkpoint import CodedTensor, TensorSource
from quantport.errors import CheckpointError
from quantport.numerics.elements import values_of
from quantport.numerics.packing import unpack_bits
from quantport.scheme.catalog import Schemes
from quantport_formats.common import exponents, need
from quantport_formats.compressed_tensors_config import Args, Group
from quantport_formats.integers import Integers
from quantport_formats.pieces import SCALES, Piece, matrix, piece, scheme_of, stored_matrix, wanted

_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Names:
    """How a quantizer names what stands beside codes.

    Attributes:
        packed: Codes of 4-bit floats.
        factor: The factor of NVFP4.
        inverse: Whether that multiplies the scales of blocks, where ours divides them.
        spare_zeros: Whether symmetric integers have zero points too, all of them 0.
    """

    packed: str = "weight_packed"
    factor: str = "weight_global_scale"
    inverse: bool = False
    spare_zeros: bool = False


class Weights:
    """Reads the weights of modules.

    Args:
        format_name: For errors.
        source: The tensors.
        schemes: Every scheme.
        dtype: In which a model holds what is not quantized.
        names: Of the tensors of a module.

    Attributes:
        schemes: Every scheme.
        notices: What is held in another way than it is stored.
    """

    def __init__(
        self,
        format_name: str,
        source: TensorSource,
        schemes: Schemes,
        dtype: torch.dtype,
        names: Names | None = None,
    ) -> None:
        self._names = names or Names()
        self.format_name, self.source, self.schemes, self._dtype = format_name, source, schemes, dtype
        self.notices: dict[str, None] = {}

    def read(self, module: str, group: Group) -> CodedTensor:
        """The weight of a module.

        Raises:
            CheckpointError: a tensor is absent, or not what the group says; or no scheme holds its numbers.
        """
        weights = group.weights
        kinds: dict[tuple[str, int], Callable[[str, Group], CodedTensor]] = {
            ("float", 8): self._fp8,
            ("float", 6): self._mxfp6,
            ("float", 4): self._fp4,
        }
        known = kinds.get((weights.kind, weights.bits))
        if weights.kind == "int" and weights.bits <= 8 and weights.strategy in ("tensor", "channel", "group"):
            return self._integers(module, group)
        if known is None or (weights.kind == "float" and not weights.symmetric):
            zero = "" if weights.symmetric else ", asymmetric"
            raise self.wrong(
                f"{module} in {weights.kind}{weights.bits} per {weights.strategy}{zero}",
                "integers of 1 to 8 bits per tensor, channel or group, or symmetric floats of 4, 6 or 8 bits",
            )
        return known(module, group)

    def wrong(self, found: str, suggestion: str) -> CheckpointError:
        """The error of this checkpoint."""
        return CheckpointError(f"read {self.source.directory} as {self.format_name}", found, suggestion)

    def _wanted(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> torch.dtype:
        return wanted(self.source, self.format_name, name, [shape], dtypes)

    def _matrix(self, name: str, dtype: torch.dtype) -> tuple[int, int]:
        """Shape of a tensor of codes."""
        info = need(self.source, self.format_name, name)
        if len(info.shape) != 2 or info.dtype is not dtype or not all(info.shape):
            raise self.wrong(
                f"{name} of shape {list(info.shape)}, dtype {info.dtype}", f"a matrix of {dtype}"
            )
        return info.shape[0], info.shape[1]

    def _integers(self, module: str, group: Group) -> CodedTensor:
        weights, inputs = group.weights, group.inputs
        integers = Integers(self.format_name, self.source, module, weights, self._names.spare_zeros)
        eight_bits = inputs is not None and (inputs.kind, inputs.bits) == ("int", 8)
        short = ("int4_weight_only", "int4_w4a8")[eight_bits]
        base = ("int8_weight_only", "int8")[eight_bits] if integers.wide else short
        scheme = scheme_of(self.schemes, base, integers.block, integers.scale, integers.offsets)
        if integers.ordered:
            scheme = self.schemes[f"{scheme.name}:actorder"]
        self.notices |= dict.fromkeys(integers.notices)
        if integers.as_stored:
            keys = {integers.key: integers.codes, "weight_scale": integers.scales}
            return stored_matrix(self.source, integers.shape, self._dtype, scheme, keys, integers.tensors[2:])
        return matrix(integers.shape, self._dtype, scheme, integers.pieces(), integers.tensors)

    def _fp8(self, module: str, group: Group) -> CodedTensor:
        weights, name, scale = group.weights, f"{module}.weight", f"{module}.weight_scale"
        n, k = self._matrix(name, torch.float8_e4m3fn)
        dtype = need(self.source, self.format_name, scale).dtype
        if weights.group == 32 and (weights.exponents or dtype in _EXPONENTS):
            return self._mx(module, group, "mxfp8", name, (n, k))
        active = group.inputs is not None and (group.inputs.kind, group.inputs.bits) == ("float", 8)
        down, across = weights.block if weights.strategy == "block" else (1, weights.group)
        if weights.strategy in ("tensor", "channel"):
            base, block = f"fp8_per_{weights.strategy}" if active else "fp8_weight_only", weights.strategy
            tensor = weights.strategy == "tensor"
            shapes = [(1,), (), (1, 1)] if tensor else [(n, 1), (n,)]
        elif weights.strategy in ("group", "block"):
            base, block = ("fp8_weight_only", "fp8_per_channel")[active], f"g{across}"
            blocks = -(-n // down), -(-k // across)
            shapes = [blocks, (blocks[0], 1, blocks[1], 1)]
            if (down, across) == (128, 128) and active:
                base, block = "fp8_per_block", ""
        else:
            raise self.wrong(f"{module} in float8 per {weights.strategy}", "tensor, channel, group or block")
        wanted(self.source, self.format_name, scale, shapes, SCALES)
        scheme = scheme_of(self.schemes, base, block)
        if weights.strategy != "block" or not block:
            keys = {"weight": name, "weight_scale": scale}
            return stored_matrix(self.source, (n, k), self._dtype, scheme, keys)
        self.notices[
            f"scales of blocks of {down}x{across} are held for each row of a block: no scheme has such blocks"
        ] = None
        pieces: dict[str, Piece] = {
            "weight": piece(self.source, name),
            "weight_scale": partial(_spread, self.source, scale, down),
        }
        return matrix((n, k), self._dtype, scheme, pieces, (name, scale))

    def _fp4(self, module: str, group: Group) -> CodedTensor:
        name = f"{module}.{self._names.packed}"
        n, columns = self._matrix(name, torch.uint8)
        if group.weights.group == 32:
            return self._mx(module, group, "mxfp4", name, (n, 2 * columns))
        if group.weights.group != 16:
            raise self.wrong(
                f"{module} in groups of {group.weights.group} float4", "groups of 32 (MXFP4) or 16 (NVFP4)"
            )
        k, scale, factor = 2 * columns, f"{module}.weight_scale", f"{module}.{self._names.factor}"
        self._wanted(scale, (n, -(-k // 16)), torch.float8_e4m3fn)
        wanted(self.source, self.format_name, factor, [(1,), ()], [torch.float32])
        scheme = self.schemes["nvfp4" if _are_floats(group.inputs, 4) else "nvfp4_weight_only"]
        keys = {"weight_packed": name, "weight_scale": scale, "weight_global_scale": factor}
        if not self._names.inverse:
            return stored_matrix(self.source, (n, k), self._dtype, scheme, keys)
        self.notices[
            "factors of NVFP4 are held as reciprocals: values that are kept are within 2 units in the last "
            "place of fp32"
        ] = None
        pieces = {key: piece(self.source, stored) for key, stored in keys.items()}
        pieces["weight_global_scale"] = piece(self.source, factor, 0, torch.reciprocal)
        kept = matrix((n, k), self._dtype, scheme, pieces, keys.values())
        return replace(kept, values=partial(_times_factor, self.source, name, scale, factor))

    def _mx(self, module: str, group: Group, base: str, name: str, shape: tuple[int, int]) -> CodedTensor:
        n, k = shape
        scale = f"{module}.weight_scale"
        self._wanted(scale, (n, -(-k // 32)), *_EXPONENTS)
        inputs = group.inputs
        of_mx = inputs is not None and inputs.group == 32
        if base == "mxfp4" and of_mx and _are_floats(inputs, 8):
            scheme = "mxfp4_w4a8"
        else:
            scheme = base if of_mx and _are_floats(inputs, int(base[-1])) else f"{base}_weight_only"
        keys = {"weight" if base == "mxfp8" else "weight_packed": name, "weight_scale": scale}
        if self.source.tensors[scale].dtype is torch.uint8:
            return stored_matrix(self.source, shape, self._dtype, self.schemes[scheme], keys)
        pieces = {key: piece(self.source, stored) for key, stored in keys.items()}
        pieces["weight_scale"] = piece(self.source, scale, 1, _bytes)
        return matrix(shape, self._dtype, self.schemes[scheme], pieces, keys.values())

    def _mxfp6(self, module: str, group: Group) -> CodedTensor:
        name, scale = f"{module}.weight_packed", f"{module}.weight_scale"
        n, columns = self._matrix(name, torch.uint8)
        k = columns // 3 * 4
        if columns % 3 or group.weights.group != 32:
            found = f"{module}: rows of {columns} bytes, groups of {group.weights.group}"
            raise self.wrong(found, "whole threes of bytes, groups of 32 (MXFP6)")
        self._wanted(scale, (n, -(-k // 32)), *_EXPONENTS)
        active = _are_floats(group.inputs, 8) and group.inputs is not None and group.inputs.group == 32
        scheme = self.schemes["mxfp8" if active else "mxfp8_weight_only"]
        self.notices["6-bit floats (E2M3) are held in 8 bits (E4M3), which has all of their values"] = None
        pieces = {
            "weight": piece(self.source, name, 1, partial(_e2m3, k)),
            "weight_scale": piece(self.source, scale, 1, _bytes),
        }
        return matrix((n, k), self._dtype, scheme, pieces, (name, scale))


def _are_floats(inputs: Args | None, bits: int) -> bool:
    return inputs is not None and (inputs.kind, inputs.bits) == ("float", bits)


def _bytes(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8)


def _e2m3(k: int, packed: Tensor) -> Tensor:
    table = values_of("e2m3").to(torch.float8_e4m3fn).view(torch.uint8)
    return table[unpack_bits(packed, k, 6).int()].view(torch.float8_e4m3fn)


def _times_factor(
    source: TensorSource, name: str, scale: str, factor: str, expert: int | None, rows: slice
) -> Tensor:
    """Values of NVFP4 whose factor multiplies the scales of blocks, in the order of its writer."""
    assert expert is None  # matrices only
    packed = source.read(name, rows)
    codes = values_of("e2m1")[unpack_bits(packed, 2 * packed.shape[1], 4).int()]
    scales = source.read(scale, rows).float() * source.read(factor)
    return codes * scales.repeat_interleave(16, 1)[:, : codes.shape[1]]


def _spread(source: TensorSource, name: str, down: int, rows: slice) -> Tensor:
    """The scales of blocks of ``down`` rows, for each row."""
    first = rows.start // down
    scales = exponents(source.read(name, slice(first, -(-rows.stop // down))))
    return scales.repeat_interleave(down, 0)[rows.start - first * down : rows.stop - first * down]
