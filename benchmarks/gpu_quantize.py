"""Times quantizing a weight on the device as in loading: BF16 bytes read per second, and the share of a copy's bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_place import Place, interleaved, one_line

SHAPE = (28672, 8192)
SMOKE = (32, 256)


def run(place: Place, previous: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Every scheme. The limit reads the weight and writes the stored tensors once, at the measured copy bandwidth."""
    from quantport.plugins.registry import default_registry

    n, k = SMOKE if place.smoke else SHAPE
    weights = [torch.randn(n, k, device=place.torch).mul_(0.02).to(place.dtypes[0]) for _ in range(2)]
    bandwidth = previous.get("limits", {}).get("copy")
    names = [name for name in default_registry().schemes if name != "bf16"][: 3 if place.smoke else None]
    rows = {name: {"scheme": name, "missing": "out of time"} for name in names}
    for own in (True, False):  # the reference is slow, so the room's quantizer comes first
        for name in names:
            done = rows[name].get("missing") != "out of time"
            if done or place.over(0 if place.smoke else 1):
                continue
            try:
                if row := one(place, default_registry().schemes[name], weights, own):
                    row["share"] = row["bytes"] / bandwidth / row["seconds"] if bandwidth else None
                    rows[name] = {"scheme": name, **row}
            except Exception as error:  # the others go on
                rows[name]["missing"] = one_line(error)
            keep({"rows": list(rows.values()), "shape": [n, k]})


def one(place: Place, scheme: Any, weights: list[torch.Tensor], own: bool) -> dict[str, Any] | None:
    """One scheme, by the room's quantizer (``own``; None where it declines), or by the reference on the device."""
    from quantport import numerics
    from quantport.plugins.registry import default_registry

    fast = default_registry().backends[place.device.kind].quantize_weight
    if own and fast(weights[0], scheme) is None:
        return None
    call: Callable[[int], Any] = (
        (lambda i: fast(weights[i % 2], scheme))
        if own
        else (lambda i: numerics.quantize_weight(weights[i % 2], scheme))
    )
    seconds = interleaved(place, {"": call}, 7 if own else 1)[""]
    n, k = weights[0].shape
    moved = 2 * n * k + scheme.bytes(n, k)
    return {
        "by": "room" if own else "reference",
        "seconds": seconds,
        "bytes": moved,
        "read_GBps": 2e-9 * n * k / seconds,
    }
