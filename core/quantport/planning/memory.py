"""The memory that loading may hold beside the quantized model: how much, and what one weight takes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from quantport.errors import BudgetError, ConfigError
from quantport.kernels.base import Kernel, PackedLayout, WeightSpec
from quantport.kernels.packing import layout_of
from quantport.numerics.blocks import LARGE, padded
from quantport.numerics.by_rows import rows_of_step, spans_rows

BUDGET = 512 << 20  # bytes, where nobody says otherwise
PLAIN, SEARCH = 24, 36  # bytes of scratch for each element of a chunk: six fp32 copies; a search holds nine
SCRATCH = SEARCH * LARGE  # bytes of scratch that quantizing one weight holds at most
# Bytes of a weight that are read at a time. What is freed after one step is there for the next: of larger
# steps every page comes from the system again, which takes as long as to quantize it.
STEP = 4 << 20
ONCE = 32 << 20  # bytes of a weight that is read as a whole, where a scale spans all of its rows
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", re.IGNORECASE)


def parse_size(value: int | str, argument: str) -> int:
    """Reads bytes, or a text such as ``"512MB"`` (powers of 1000) or ``"512MiB"`` (powers of 1024).

    Args:
        value: What was given.
        argument: As what, for errors: ``budget``, ``--max-shard-size``.

    Raises:
        ConfigError: it is neither, or not positive.
    """
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    size = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if match and match[2].upper() in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ConfigError(
            f"{argument}={value!r}", "not an amount of memory", "bytes, or a text such as '512MB' or '2GiB'"
        )
    return size


def parse_budget(value: int | str | None) -> int | None:
    """`parse_size` of a budget, or None."""
    return None if value is None else parse_size(value, "budget")


def step_rows(spec: WeightSpec, dtype: torch.dtype, layout: PackedLayout | None) -> int:
    """Rows of a weight that are read, quantized and, where ``layout`` is known, packed at a time.

    A scale that spans all rows is found in a pass of its own, and rows are copied beside what it follows
    from: a weight that is not large takes half of the time as a whole.
    """
    twice = spans_rows(spec.scheme.weight) and not spec.scheme.rotation
    if spec.n * spec.k * dtype.itemsize <= (ONCE if twice else STEP):
        return spec.n
    block = layout.block if layout else 1
    return rows_of_step(spec.scheme, spec.n, spec.k, STEP // dtype.itemsize, block)


def peak_bytes(
    spec: WeightSpec, source: torch.dtype, layout: PackedLayout | None = None, *, read: bool = True
) -> int:
    """Most bytes that are in flight while one weight is read, quantized and packed.

    Args:
        spec: The weight.
        source: Dtype that it is read in.
        layout: What it is packed into, where that goes by rows.
        read: Whether reading takes memory; not where the caller owns the weight.

    Returns:
        The rows that are read, scratch, codes before several share a byte, and the stored tensors: of the
        rows, and of the whole weight where that is packed as a whole.
    """
    scheme, quant = spec.scheme, spec.scheme.weight
    rows = step_rows(spec, source, layout)
    elements, cut = rows * spec.k, rows < spec.n
    codes = elements if quant.element.bits < 8 or quant.element.block else 0
    scratch = min(SCRATCH, (SEARCH if quant.searched else PLAIN) * rows * padded(spec.k, quant))
    # in fp32: the weight, its rotation and the rotated blocks; then the rotation beside the scratch
    if scheme.rotation:
        scratch = max(12 * elements, 4 * elements + scratch)
    copies = int(read) + (cut and spans_rows(quant))  # quantized beside its extremes
    stored = (1 + cut) * scheme.bytes(rows, spec.k)  # while rows are quantized, those before are still there
    whole = scheme.bytes(spec.n, spec.k) if cut and layout is None else 0
    return copies * elements * source.itemsize + codes + scratch + stored + whole


def peak_with(kernel: Kernel | None, spec: WeightSpec, source: torch.dtype, *, read: bool = True) -> int:
    """`peak_bytes` of a weight that a kernel packs; as a whole where that is None."""
    return peak_bytes(spec, source, layout_of(kernel, spec) if kernel else None, read=read)


def resolve_budget(requested: int | None, peaks: Mapping[str, int]) -> int:
    """The budget to keep: what was asked for, or the default, or more where the largest weight needs more
    than that.

    Args:
        requested: In bytes, or None.
        peaks: Weight name -> bytes that it needs by itself.

    Raises:
        BudgetError: a weight needs more than was asked for; it is named.
    """
    largest = max(peaks, key=lambda name: peaks[name], default=None)
    most = peaks[largest] if largest is not None else 0
    if requested is not None and most > requested:
        raise BudgetError(
            f"stream within {requested / 1e6:.1f} MB (budget=)",
            f"{largest} alone needs {most / 1e6:.1f} MB to be read, quantized and packed",
            f"budget={most} or more",
        )
    return max(BUDGET, most) if requested is None else requested
