"""Weights that are made of several stored tensors: which rows of each, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from quantport.checkpoint import CodedTensor, TensorSource
from quantport.errors import CheckpointError
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes
from quantport_formats.common import need

Convert = Callable[[Tensor], Tensor]
Piece = Callable[[slice], Tensor]
"""One tensor of a scheme's layout for rows ``[start, stop)`` of a weight; any shape with its elements."""
SCALES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def wanted(
    source: TensorSource,
    format_name: str,
    name: str,
    shapes: Iterable[tuple[int, ...]],
    dtypes: Iterable[torch.dtype],
) -> torch.dtype:
    """The dtype of a tensor that has one of some shapes and dtypes.

    Raises:
        CheckpointError: it is absent, or another.
    """
    info, shapes, dtypes = need(source, format_name, name), list(shapes), list(dtypes)
    if tuple(info.shape) not in shapes or info.dtype not in dtypes:
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise CheckpointError(
            f"read {name} of {source.directory} as {format_name}",
            f"shape {list(info.shape)}, dtype {info.dtype}",
            f"shape {' or '.join(str(list(shape)) for shape in shapes)}, dtype {kinds}: the whole checkpoint",
        )
    dtype: torch.dtype = info.dtype
    return dtype


def piece(source: TensorSource, name: str, rows: int = 1, convert: Convert | None = None) -> Piece:
    """A stored tensor, each row of which is for so many rows of the weight; 0: for all of them."""
    return partial(_piece, source, name, rows, convert)


def _piece(source: TensorSource, name: str, rows: int, convert: Convert | None, some: slice) -> Tensor:
    stored = source.read(name, slice(some.start // rows, -(-some.stop // rows)) if rows else None)
    return stored if convert is None else convert(stored)


def matrix(
    shape: tuple[int, int],
    dtype: torch.dtype,
    scheme: Scheme,
    pieces: Mapping[str, Piece],
    tensors: Iterable[str],
) -> CodedTensor:
    """A weight ``[n, k]``, the keys of whose layout are made by pieces, which are cast to its dtypes.

    Args:
        shape: ``(n, k)``.
        dtype: In which a model holds it that does not quantize it.
        scheme: What its numbers are.
        pieces: For each key of the layout what makes it.
        tensors: The stored tensors that it takes.
    """
    return CodedTensor(
        shape, dtype, scheme, tuple(tensors), read=partial(_assembled, scheme, shape[1], pieces)
    )


def stored_matrix(
    source: TensorSource,
    shape: tuple[int, int],
    dtype: torch.dtype,
    scheme: Scheme,
    keys: Mapping[str, str],
    also: Iterable[str] = (),
) -> CodedTensor:
    """A weight ``[n, k]`` whose stored tensors are those of the layout, up to dtypes and dimensions of 1."""
    tensors = (*keys.values(), *also)
    found = {
        key: (tuple(source.tensors[name].shape), source.tensors[name].dtype) for key, name in keys.items()
    }
    layout = scheme.layout(*shape)
    if found == layout:
        return CodedTensor(shape, dtype, scheme, tensors, keys)
    each = scheme.weight.block_shape[0]
    rows = {key: 0 if n == 1 else 1 if n == shape[0] else each for key, ((n, *_), _) in layout.items()}
    return matrix(shape, dtype, scheme, {key: piece(source, keys[key], rows[key]) for key in layout}, tensors)


def _assembled(
    scheme: Scheme, k: int, pieces: Mapping[str, Piece], expert: int | None, rows: slice
) -> dict[str, Tensor]:
    assert expert is None  # matrices only
    layout = scheme.layout(rows.stop - rows.start, k)
    return {key: pieces[key](rows).to(dtype).reshape(shape) for key, (shape, dtype) in layout.items()}


def scheme_of(
    schemes: Schemes, base: str, block: str = "", scale: torch.dtype | None = None, offsets: bool = False
) -> Scheme:
    """A scheme of the catalogue, with the options that it needs to be what is stored.

    Args:
        schemes: Every scheme.
        base: Its name.
        block: ``g64``, ``channel`` or ``tensor``; empty for the blocks that it has.
        scale: Dtype of the scales; None for that which it has.
        offsets: Whether there are offsets beside the scales.
    """
    scheme = schemes[base]
    for option in filter(None, (block, _NAMES[scale] if scale else "", "asym" if offsets else "")):
        changed = schemes[f"{scheme.name}:{option}"]
        scheme = scheme if changed.weight == scheme.weight else changed
    return scheme
