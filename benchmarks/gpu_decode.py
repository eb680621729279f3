"""Decodes one sequence with the 8B shape from a CUDA graph: BF16 and the schemes in turn, with weights made on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_llama import TINY, Glue, Llama, Make, Sizes
from gpu_place import Place, Timer, one_line
from torch import nn

SCHEMES = (
    "fp8_per_channel",
    "int8",
    "int4_weight_only",
    "fp8_weight_only",
    "int8_weight_only",
    "nf4",
    "mxfp4_weight_only",
)


def maker(place: Place, scheme: str | None, dtype: torch.dtype, used: list[str]) -> Make:
    """A function that makes linear layers with random weights: in 16 bits, or with the kernel that is chosen for one row."""
    if scheme is None:

        def dense(n: int, k: int) -> nn.Module:
            layer = nn.Linear(k, n, bias=False, device="meta", dtype=dtype)
            layer.weight = nn.Parameter(
                torch.randn(n, k, device=place.torch, dtype=dtype) * 0.02, requires_grad=False
            )
            return layer

        return dense

    from quantport import numerics
    from quantport.kernels.base import Request, WeightSpec
    from quantport.modules import QuantLinear
    from quantport.planning.select_kernel import select_kernel
    from quantport.plugins.registry import default_registry

    fast = default_registry().backends[place.device.kind].quantize_weight
    # Compiled graphs find kernels by name in the registry.
    known = {kernel.name for kernel in default_registry().kernels(place.device.kind)}
    table = {kernel.name: kernel for kernel in place.kernels if kernel.name in known}

    def quantized(n: int, k: int) -> nn.Module:
        spec = WeightSpec(default_registry().schemes[scheme], n, k)
        chosen = select_kernel(Request(spec, "linear", place.device, dtype), list(table.values()))
        layer = QuantLinear(table[chosen.kernel], spec, dtype=dtype)
        layer.set_weight(
            "",
            numerics.quantize_weight(
                torch.randn(n, k, device=place.torch, dtype=dtype) * 0.02, spec.scheme, fast=fast
            ),
        )
        used.append(chosen.kernel)
        return layer

    return quantized


def step(place: Place, scheme: str | None, glue: Glue, sizes: Sizes) -> tuple[Timer, str]:
    """A step of decoding, and the kernels that run it."""
    used: list[str] = []
    dtype = place.dtypes[0]
    model = Llama(sizes, maker(place, scheme, dtype, used), place.torch, dtype, glue)
    token, at = (torch.tensor([i], device=place.torch) for i in (5, 7))
    timer = Timer(place, lambda _: model(token, at))
    if not place.smoke and timer.graph is None:
        raise RuntimeError("its step cannot be captured in a CUDA graph")
    return timer, " + ".join(dict.fromkeys(used)) or "F.linear"


def glue_for(place: Place) -> tuple[Glue, str]:
    """The glue, and ``compiled`` or why it is not."""
    if place.smoke:
        return Glue(), "as it is: smoke mode"
    try:
        glue = Glue.compiled()
        Llama(TINY, maker(place, None, place.dtypes[0], []), place.torch, place.dtypes[0], glue)(
            *(torch.tensor([i], device=place.torch) for i in (5, 7))
        )
        return glue, "compiled"
    except Exception as error:  # all models share it, so that the ratios hold
        torch._dynamo.reset()
        return Glue(), f"as it is: {one_line(error)}"


def run(place: Place, previous: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """BF16 and each scheme side by side; their weights differ, so every step reads cold ones."""
    sizes = TINY if place.smoke else Sizes()
    with torch.no_grad():
        glue, glue_state = glue_for(place)
        base, kernel = step(place, None, glue, sizes)
        rows: list[dict[str, Any]] = [{"name": "bf16", "kernel": kernel}]
        keep({"rows": rows, "glue": glue_state})
        for scheme in SCHEMES[:3] if place.smoke else SCHEMES:
            row: dict[str, Any] = {"name": scheme}
            rows.append(row)
            if place.over(0 if place.smoke else 8):
                row["missing"] = "out of time"
                continue
            try:
                timer, row["kernel"] = step(place, scheme, glue, sizes)
                times = [(base.run(), timer.run()) for _ in range(1 if place.smoke else 9)]
                slow, fast = (statistics.median(t) for t in zip(*times, strict=True))
                row |= {"ms": 1e3 * fast, "speed": slow / fast}
                rows[0] |= {"ms": 1e3 * slow, "speed": 1.0}
            except Exception as error:  # the others go on
                row["missing"] = one_line(error)
            keep({"rows": rows})
