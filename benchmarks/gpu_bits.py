"""Compares quantization on the device with the reference on the CPU, bit for bit: weights of every scheme, and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gpu_workers
import torch
from gpu_checks import OPTIONS
from gpu_place import Place

SHAPES = ((67, 200), (256, 1024))
SMALL = ((7, 96), (64, 256))
SMOKE = ("fp8_per_channel", "int4_weight_only", "mxfp4_weight_only")


def hard(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix on the CPU with hard cases: zeros, ties, subnormals, huge and tiny rows, outliers."""
    x = torch.randn(m, k)
    x[0] = 0
    x[1] *= 1e-3 if dtype is torch.float16 else 1e-30
    x[2] *= 1e3 if dtype is torch.float16 else 1e30
    x[3] = torch.arange(k).remainder(17) * 0.5 - 4
    x[4, ::7] = 0
    x[5, :] = torch.finfo(dtype).smallest_normal / 2
    x[6, 3] = 300
    return x.to(dtype)


def present(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The tensors that are not None."""
    return {name: t for name, t in tensors.items() if t is not None}


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> str:
    """The differences between the bits of two sets of tensors; empty where there are none."""
    wrong = [
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or a[name].dtype != b[name].dtype or a[name].shape != b[name].shape
    ]
    if wrong:
        return f"other tensors: {', '.join(sorted(wrong))}"
    for name in a:
        x, y = (t.cpu().contiguous().view(torch.uint8) for t in (a[name], b[name]))
        if not torch.equal(x, y):
            wrong.append(f"{name}: {(x != y).sum().item()} of {x.numel()} bytes differ")
    return "; ".join(wrong)


def weights(place: Place, name: str) -> dict[str, str]:
    """The weights of one scheme, by the room's quantizer, or by the reference on the device where it declines."""
    from quantport import numerics
    from quantport.plugins.registry import default_registry

    scheme, fast = (
        default_registry().schemes[name],
        default_registry().backends[place.device.kind].quantize_weight,
    )
    wrong: list[str] = []
    by_room: list[bool] = []

    def recorded(w: torch.Tensor, s: Any) -> Any:
        stored = fast(w, s)
        by_room.append(stored is not None)
        return stored

    for shape in SMALL if place.smoke else SHAPES:
        for dtype in place.dtypes:
            dense = hard(*shape, dtype)
            expected = numerics.quantize_weight(dense, scheme)
            # numerics rotates the weight before it calls the room.
            result = numerics.quantize_weight(dense.to(place.torch), scheme, fast=recorded)
            wrong.append(equal(result, expected))
    failures = "; ".join(w for w in wrong if w)
    return {"by": "room" if all(by_room) else "reference", "state": failures or "equal"}


def activations(place: Place, quant: Any) -> dict[str, str]:
    """One quantization of activations, by ``quantport_triton.quantize``."""
    from quantport import numerics
    from quantport_triton.quantize import quantize

    wrong = []
    for shape in ((1, 200), *(SMALL if place.smoke else SHAPES)):
        for dtype in place.dtypes:
            x = hard(max(7, shape[0]), shape[1], dtype)[-shape[0] :]
            blocks = numerics.quantize_blocks(x, quant)
            codes = (
                blocks.codes
                if quant.element.bits == 8
                else numerics.pack_bits(blocks.codes, quant.element.bits)
            )
            result = quantize(x.to(place.torch), quant)
            tensors = {"codes": result.codes, "scale": result.scale, "outer": result.outer}
            expected = {"codes": codes, "scale": blocks.scale, "outer": blocks.outer}
            wrong.append(equal(present(tensors), present(expected)))
    failures = "; ".join(w for w in wrong if w)
    return {"by": "quantport_triton", "state": failures or "equal"}


def items(place: Place) -> list[str | Any]:
    """Names of schemes, for their weights, then the quantizations of their activations."""
    from quantport.plugins.registry import default_registry

    schemes = default_registry().schemes
    names = SMOKE if place.smoke else [n for n in (*schemes, *OPTIONS) if n != "bf16"]
    return [*names, *dict.fromkeys(schemes[n].activation for n in names if schemes[n].activation)]


def row(item: Any) -> dict[str, Any]:
    """The name of an item."""
    if isinstance(item, str):
        return {"name": f"weights, {item}"}
    return {"name": f"activations, {item}, {item.scale}, {item.rule}"}


def rows(place: Place, item: Any) -> Iterator[dict[str, Any]]:
    """The row of one item."""
    yield {**row(item), **(weights if isinstance(item, str) else activations)(place, item)}


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows by name, as the page has them."""
    out = []
    for line in sorted(lines, key=lambda r: r["name"], reverse=True):
        row = {k: line[k] for k in ("name", "by", "state") if k in line}
        row |= {new: line[old] for old, new in (("failure", "state"), ("skipped", "missing")) if old in line}
        out.append(row)
    return {"rows": out, "failed": sum(r.get("state", "equal") != "equal" for r in out)}


def run(place: Place, previous: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Every item, over several processes."""
    gpu_workers.spread(place, "gpu_bits", summary, keep)
