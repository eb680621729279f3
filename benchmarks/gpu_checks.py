"""Checks every kernel of the room against the reference on the device, for every scheme that it accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gpu_workers
import torch
from gpu_place import Place, one_line, weight
from gpu_targets import ROWS, SHAPES

Row = dict[str, Any]
SMOKE = ("int4_weight_only", "fp8_per_channel", "fp8_per_block", "int8", "nf4")
OPTIONS = ("nf4:double", "fp4:double", "mxfp4:mse", "nvfp4:mse", "int4_weight_only:hadamard")
FEW = (1, 2, 16, 17, 64, 257)
ODD = ((160, 256), (67, 200), (1024, 1408))  # whole blocks, none, and those of a small model
TIMED = (
    "fp8_per_channel",
    "fp8_per_tensor",
    "fp8_per_block",
    "int8",
    "int4_weight_only",
    "int8_weight_only",
    "fp8_weight_only",
    "nf4",
    "mxfp4_weight_only",
    "nvfp4_weight_only",
    "mxfp8",
    "mxfp4",
    "nvfp4",
)


class Case(NamedTuple):
    """One weight and one dtype; every kernel that accepts it runs at each number of rows."""

    scheme: str
    shape: tuple[int, int]
    dtype: torch.dtype
    rows: tuple[int, ...]


def items(place: Place) -> list[Case]:
    """The first measured shape, small shapes for every scheme, the other measured shapes; then the second dtype."""
    from quantport.plugins.registry import default_registry

    names = [n for n in default_registry().schemes if n != "bf16"] + list(OPTIONS)
    main, *others = place.dtypes
    if place.smoke:
        return [Case(n, (16, 160), main, (1, 17)) for n in SMOKE]
    measured = [[Case(n, s, main, ROWS) for n in TIMED] for s in SHAPES]
    small = [[Case(n, s, main, FEW) for n in names] for s in ODD]
    other = [[Case(n, s, d, (1, 17, 257)) for n in names] for d in others for s in ODD]
    order = [measured[0], small[0], *measured[1:4], small[1], *measured[4:], small[2], *other]
    return [case for group in order for case in group]


def row(case: Case) -> Row:
    """The row of a case that has none of its own."""
    return {"kernel": "every kernel", "scheme": case.scheme, "case": f"{case.shape}, {case.dtype}"}


def rows(place: Place, case: Case) -> Iterator[Row]:
    """The rows of one case. The reference is ``numerics.linear`` in fp32 on the same device, without TF32."""
    from quantport import numerics
    from quantport.kernels.base import Request, WeightSpec
    from quantport.kernels.verdict import Accepted
    from quantport.plugins.registry import default_registry

    scheme, (n, k) = default_registry().schemes[case.scheme], case.shape
    spec = WeightSpec(scheme, n, k)
    big = case.shape in SHAPES  # torch's own operators are slow there, and checked at small shapes
    kernels = [x for x in place.kernels if not (big and x.name.startswith("torch."))]
    accepting = [
        x
        for x in kernels
        if isinstance(x.verdict(Request(spec, "linear", place.device, case.dtype)), Accepted)
    ]
    if not accepting:
        return
    dense = weight(n, k, case.dtype, place.torch)
    stored = numerics.quantize_weight(
        dense, scheme, fast=default_registry().backends[place.device.kind].quantize_weight
    )
    # Large shapes have no bias: the launches are those that are timed later.
    bias = None if big else torch.randn(n, device=place.torch).to(case.dtype)
    for m in case.rows:
        if place.over(2):
            yield {**row(case), "skipped": "out of time"}
            return
        x = torch.randn(m, k, device=place.torch).to(case.dtype)
        x[0, :: max(1, k // 3)] *= 20  # outliers
        expected = {
            full: numerics.linear(x, stored, scheme if full else scheme.weight_only, bias).float()
            for full in {kernel.quantizes_activations for kernel in accepting}
        }
        name = f"{n}x{k}, M={m}, {str(case.dtype).removeprefix('torch.')}"
        for kernel in accepting:
            line: Row = {"kernel": kernel.name, "scheme": case.scheme, "case": name}
            line["tolerance"] = kernel.tolerance
            try:
                y = kernel.apply(x, kernel.pack(stored, spec), bias, spec).float()
                reference = expected[kernel.quantizes_activations]
                line["error"] = ((y - reference).abs().max() / reference.abs().max()).item()
                # False for a NaN.
                line["ok"] = y.shape == reference.shape and line["error"] <= kernel.tolerance
            except Exception as error:  # the others are checked all the same
                line |= {"ok": False, "failure": one_line(error)}
            yield line


def run(place: Place, previous: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Every case, over several processes."""
    gpu_workers.spread(place, "gpu_checks", summary, keep)


def summary(lines: list[Row]) -> dict[str, Any]:
    """A row for each kernel and scheme: cases, largest error, and what failed."""
    out: dict[tuple[str, str], Row] = {}
    for row in lines:
        one = out.setdefault(
            (row["kernel"], row["scheme"]),
            {"kernel": row["kernel"], "scheme": row["scheme"], "cases": 0, "failures": [], "skipped": 0},
        )
        if row.get("skipped"):
            one["skipped"] += 1
            continue
        one["cases"] += 1
        if "error" in row:
            one |= {"error": max(row["error"], one.get("error", 0.0)), "tolerance": row["tolerance"]}
        if not row["ok"]:
            one["failures"].append(f"{row['case']}: {row.get('failure') or format(row['error'], '.1e')}")
    return {"rows": list(out.values()), "failed": sum(bool(r["failures"]) for r in out.values())}
