"""Quantizes one rank's shard of a weight, so that the stored bytes do not depend on how many ranks there are.

A scale that spans several shards follows from a largest magnitude that is reduced over the ranks; a block
must lie in one shard. Two small reductions besides let all ranks agree on success: an error on one is an
error on all, and never a hang.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quantport import numerics
from quantport.errors import ConfigError, QuantportError, WeightError
from quantport.scheme import Scheme

Maximum = Callable[[Tensor], Tensor]
_PROBE = 1 << 14  # a multiple of every block and packing there is
_PACKED = {4: 2, 6: 4}  # codes to a whole number of bytes


def quantize_shard(
    shard: Tensor,
    scheme: Scheme,
    dim: int,
    group: Any = None,
    *,
    reduce: Maximum | None = None,
    place: tuple[int, int] | None = None,
    name: str = "weight",
    nonfinite: str = "error",
) -> dict[str, Tensor]:
    """Quantizes this rank's rows or columns of a weight. Every rank of the group must call it, for the same
    weights in order.

    Args:
        shard: ``[n / ranks, k]`` for ``dim=0`` (column parallel: the outputs are split), ``[n, k / ranks]``
            for ``dim=1`` (row parallel: the inputs are split); bf16, fp16 or fp32.
        scheme: The scheme.
        dim: The dimension that is split.
        group: ``torch.distributed`` process group; None is the default group.
        reduce: Elementwise maximum of an fp32 tensor over the ranks, instead of ``group``.
        place: ``(rank, number of ranks)``, with ``reduce``: the last shard may end in a short block.
        name: Of the weight, for errors.
        nonfinite: ``error`` refuses NaN and Inf on every rank; ``zero`` reads each of them as 0.

    Returns:
        The stored tensors of this shard: ``join_shards`` of all ranks' gives those of the whole weight,
            byte for byte.

    Raises:
        ConfigError: the shard is not aligned to the blocks of the scheme, or there is no process group.
        WeightError: wrong rank or dtype, or a NaN or Inf, in any shard.
    """
    if dim not in (0, 1):
        raise ConfigError(
            f"dim={dim!r}",
            "not a dimension of a weight [out, in]",
            "0 to split the outputs, 1 to split the inputs",
        )
    maximum = reduce or _all_reduce(group)
    rank, ranks = place or ((0, 2) if reduce else (dist.get_rank(group), dist.get_world_size(group)))
    # the size of a rotation follows from the whole K
    whole = ranks == 1 or (rank == ranks - 1 and not scheme.rotation)
    _agree(maximum, _refusal(shard, scheme, dim, name, whole), shard, name)
    clean = torch.nan_to_num(shard, nan=0.0, posinf=0.0, neginf=0.0) if nonfinite == "zero" else shard

    def over_shards(amax: Tensor, rows: int, cols: int) -> Tensor:
        if (cols if dim else rows) != 0:
            return amax
        # what a maximum makes of NaN is up to the library
        return maximum(torch.where(amax.isfinite(), amax, math.inf))

    stored: dict[str, Tensor] = {}
    failed: QuantportError | None = None
    try:
        stored = numerics.quantize_weight(clean, scheme, name, reduce=over_shards)
    except QuantportError as error:
        failed = error
    _agree(maximum, failed, shard, name)
    return stored


def why_not_split(
    scheme: Scheme, dim: int, size: int, *, is_whole: bool = False, is_stored: bool = False
) -> tuple[str, str] | None:
    """Why a shard of so many rows or columns cannot be quantized to what it is of the whole weight, and what
    could be; None where it can.

    Args:
        scheme: The scheme.
        dim: The dimension that is split.
        size: Rows or columns of the shard.
        is_whole: It may end in a short block, as the whole weight does.
        is_stored: It is quantized already: what belongs to all shards is known.
    """
    if scheme.ordered and dim == 1:
        return "columns in an order of the whole weight", scheme.in_order.name
    if scheme.weight.zero_point and spans_shards(scheme, dim) and not is_stored:
        return "offsets that belong to all ranks, of which only magnitudes are shared", "a scheme with groups"
    step = alignment(scheme, dim)
    if size % step and not is_whole:
        return (
            f"{size} is not a multiple of {step}: a block would lie in two shards",
            f"shards of a multiple of {step}: fewer ranks, or a scheme with smaller blocks",
        )
    return None


def spans_shards(scheme: Scheme, dim: int) -> bool:
    """Whether a scale, or an offset, belongs to all shards of a weight that is split along ``dim``."""
    weight = (
        scheme.in_order.per_token
    )  # the order of columns and the scale of activations are no scales of it
    return None in shard_dims(weight, dim).values()


def alignment(scheme: Scheme, dim: int) -> int:
    """What a boundary between shards must be a multiple of, along ``dim``."""
    weight = scheme.weight
    outer = weight.outer_block or (0, 0)
    if dim == 0:
        return math.lcm(*(x or 1 for x in (weight.block_shape[0], outer[0])))
    packing = 8 if weight.format == "int4" else _PACKED.get(weight.element.bits, 1)
    return math.lcm(
        *(x or 1 for x in (weight.group_size, outer[1], scheme.rotation, weight.element.block, packing))
    )


@lru_cache(maxsize=256)
def shard_dims(scheme: Scheme, dim: int) -> Mapping[str, int | None]:
    """For each stored tensor, the dimension along which those of the shards are joined; None where all have
    the same.
    """
    whole = scheme.layout(_PROBE, _PROBE)
    half = scheme.layout(*(_PROBE // 2 if d == dim else _PROBE for d in (0, 1)))
    dims = {
        key: next((d for d, size in enumerate(shape) if size != half[key][0][d]), None)
        for key, (shape, _) in whole.items()
    }
    return MappingProxyType(dims)


def join_shards(shards: Sequence[dict[str, Tensor]], scheme: Scheme, dim: int) -> dict[str, Tensor]:
    """The stored tensors of the whole weight from those of every rank, in order.

    Raises:
        WeightError: a tensor that all shards share differs between them.
    """
    out = {}
    for key, along in shard_dims(scheme, dim).items():
        parts = [s[key] for s in shards]
        if along is None and any(not torch.equal(numerics.bits(p), numerics.bits(parts[0])) for p in parts):
            suggestion = "shards that quantize_shard made together"
            raise WeightError(
                f"join {len(parts)} shards of {scheme.name}", f"{key} differs between them", suggestion
            )
        out[key] = (
            parts[0]
            if along is None
            else torch.cat([numerics.bits(p) for p in parts], along).view(parts[0].dtype)
        )
    return out


def _refusal(shard: Tensor, scheme: Scheme, dim: int, name: str, whole: bool) -> QuantportError | None:
    """What is wrong with a shard, before any value of it is looked at."""
    asked = f"quantize a shard of {name} to {scheme.name}, split along dimension {dim}"
    if shard.dim() != 2 or shard.dtype not in numerics.FLOATS or not shard.numel():
        suggestion = "a matrix with elements, in bfloat16, float16 or float32"
        return WeightError(asked, f"shape {list(shard.shape)}, dtype {shard.dtype}", suggestion)
    why = why_not_split(scheme, dim, shard.shape[dim], is_whole=whole)
    return ConfigError(asked, *why) if why else None


def _agree(maximum: Maximum, error: QuantportError | None, shard: Tensor, name: str) -> None:
    """Raises on every rank when there is an error on any: its own, or the news of another's."""
    failed = maximum(torch.tensor([0.0 if error is None else 1.0], dtype=torch.float32, device=shard.device))
    if error is not None:
        raise error
    if failed.item():
        raise WeightError(
            f"quantize {name} over all ranks",
            "another rank could not quantize its shard",
            "see the error of that rank",
        )


def _all_reduce(group: Any) -> Maximum:
    if not (dist.is_available() and dist.is_initialized()):
        suggestion = "torch.distributed.init_process_group first, or pass reduce="
        raise ConfigError("quantize a shard", "torch.distributed is not initialized", suggestion)

    def maximum(values: Tensor) -> Tensor:
        reduced = values.clone()
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group)
        return reduced

    return maximum
