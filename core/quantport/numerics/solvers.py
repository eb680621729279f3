"""The solvers that quantport brings: rounding to nearest, and the searches of ``search``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantport.errors import BackendError, ConfigError
from quantport.numerics import gguf
from quantport.numerics.blocks import Blocks, Reduce, quantize_blocks
from quantport.numerics.double import quantize_double
from quantport.numerics.packing import pack_bits, pack_int4
from quantport.scheme import Quant, Scheme, Solver, Stats
from quantport.scheme.formats import E8M0

__all__ = ["HalfQuadratic", "LeastSquares", "RoundToNearest", "Solver", "Stats", "checked", "solver_of"]


class RoundToNearest(Solver):
    """Codes nearest to the weight, on scales that follow from the largest magnitude of their block.

    Args:
        reduce: For a shard of a larger weight: takes maxima over all shards where a scale spans them.
    """

    name = "nearest"

    def __init__(self, reduce: Reduce | None = None) -> None:
        self.reduce = reduce

    def rule(self, quant: Quant) -> str:
        """The rule of ``Quant`` that this solver follows.

        Raises:
            ConfigError: it cannot solve this format.
        """
        if not quant.searched:
            return quant.rule
        if quant.zero_point:
            raise ConfigError(
                f"solve {quant} by {self.name!r}", "offsets, which are searched for", "'mse' or 'hqq'"
            )
        return "floor" if quant.scale == E8M0.name else "amax"

    def solve(self, weight: Tensor, scheme: Scheme, stats: Stats | None = None) -> dict[str, Tensor]:
        """As `Solver.solve`; without ``stats``. Scales are NaN or Inf where the weight holds NaN or Inf."""
        quant = scheme.weight
        if quant.element.block:
            return {"weight_blocks": gguf.quantize(weight, quant.element)}
        quant = replace(quant, rule=self.rule(quant))
        if quant.scale_quant:
            codes, extra = quantize_double(weight, quant, self.reduce)
        else:
            blocks = quantize_blocks(weight, quant, reduce=self.reduce)
            codes, extra = blocks.codes, _extra(blocks, quant)
        if quant.element.bits == 8:
            return {"weight": codes, **extra}
        packed = pack_int4(codes) if quant.format == "int4" else pack_bits(codes, quant.element.bits)
        return {"weight_packed": packed, **extra}


class LeastSquares(RoundToNearest):
    """Scales, and offsets where the scheme has them, of the least squared error of the weight."""

    name = "mse"

    def rule(self, quant: Quant) -> str:
        """``mse``.

        Raises:
            ConfigError: scales of this format are not searched for.
        """
        if quant.zero_point or quant.scale in ("e8m0", "e4m3fn"):
            return "mse"
        found = f"{quant.scale} scales without offsets"
        raise ConfigError(
            f"solve {quant} by 'mse'", found, "a scheme with offsets, or with e8m0 or e4m3fn scales"
        )


class HalfQuadratic(RoundToNearest):
    """Offsets by half-quadratic quantization."""

    name = "hqq"

    def rule(self, quant: Quant) -> str:
        """``hqq``.

        Raises:
            ConfigError: the format has no offsets.
        """
        if quant.zero_point:
            return "hqq"
        raise ConfigError(f"solve {quant} by 'hqq'", "no offsets", "a scheme with offsets, such as int4_mse")


_BY_RULE = {solver.name: solver for solver in (LeastSquares, HalfQuadratic)}


def solver_of(scheme: Scheme, reduce: Reduce | None = None) -> Solver:
    """The solver that a scheme names: its own, or that of its rule.

    Args:
        scheme: The scheme.
        reduce: As for `RoundToNearest`.

    Raises:
        ConfigError: ``reduce`` together with a solver of the scheme's own, which may look at all of a weight.
    """
    if scheme.solver is None:
        return _BY_RULE.get(scheme.weight.rule, RoundToNearest)(reduce)
    if reduce is not None:
        found = f"solver {scheme.solver.name!r}, which may look at all of a weight"
        suggestion = f"{scheme.unsolved.name}, or quantize the weight before it is split"
        raise ConfigError(f"quantize a shard to {scheme.name}", found, suggestion)
    return scheme.solver


def checked(
    stored: dict[str, Tensor], scheme: Scheme, shape: torch.Size, solver: Solver
) -> dict[str, Tensor]:
    """What a solver returned, in the order of the layout.

    Raises:
        BackendError: it is not what the scheme stores.
    """
    expected = scheme.layout(*shape)
    actual = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in stored.items()}
    if actual != expected:
        raise BackendError(f"solve {scheme.name} by {solver.name!r}", f"tensors {actual}", f"{expected}")
    return {key: stored[key] for key in expected}


def _extra(blocks: Blocks, quant: Quant) -> dict[str, Tensor]:
    """Scales, offsets and outer scales under their stored names."""
    out = {"weight_scale": blocks.scale}
    if blocks.zero is not None:
        out["weight_zero"] = blocks.zero
    if blocks.outer is not None:
        one = quant.outer_block == (0, 0)
        out["weight_global_scale" if one else "weight_outer_scale"] = (
            blocks.outer.view(-1) if one else blocks.outer
        )
    return out
