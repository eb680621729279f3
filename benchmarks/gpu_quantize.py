"""Quantizing a weight on the device, as loading does it: BF16 read a second, and the share of what a copy of as many bytes reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_place import Place, interleaved, told

SHAPE = (28672, 8192)
SMOKE = (32, 256)


def run(place: Place, found: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Every scheme; the limit moves the weight in and the stored tensors out, once each, at the measured copy bandwidth."""
    from quantport import numerics
    from quantport.host import host

    n, k = SMOKE if place.smoke else SHAPE
    dtype = place.dtypes[0]
    weights = [torch.randn(n, k, device=place.torch).mul_(0.02).to(dtype) for _ in range(2)]
    fast = host().backends[place.device.kind].quantize_weight
    bandwidth = found.get("limits", {}).get("copy")
    rows: list[dict[str, Any]] = []
    for name, scheme in host().schemes.items():
        if name == "bf16" or (place.smoke and len(rows) > 2):
            continue
        row: dict[str, Any] = {"scheme": name}
        rows.append(row)
        if place.over(1):
            row["missing"] = "out of time"
            continue
        try:
            declined = fast(weights[0][:16], scheme) is None
            row["by"] = "reference" if declined else "room"
            chosen: Callable[[torch.Tensor], Any] = (
                (lambda w, s=scheme: numerics.quantize_weight(w, s)) if declined else (lambda w, s=scheme: fast(w, s))
            )
            seconds = interleaved(place, {name: lambda i, c=chosen: c(weights[i % 2])}, 3 if declined else 7)[name]
            row |= {"seconds": seconds, "read_GBps": 2e-9 * n * k / seconds}
            if bandwidth:
                row["share"] = (2 * n * k + scheme.bytes(n, k)) / bandwidth / seconds
        except Exception as error:  # the others go on
            row["missing"] = told(error)
        keep({"rows": rows, "shape": [n, k]})
