"""The page of a checkpoint: its format, what its weights are stored as, and what each device would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from quantport.cli.page import Column, Grid, Page, size
from quantport.cli.plans import group, group_name
from quantport.planning.plan import Plan
from quantport.planning.steps import Step

_COLUMNS = (
    Column("layers"),
    Column("count", right=True),
    Column("stored as"),
    Column("bits per weight", right=True),
    Column("n x k", 1),
    Column("size", right=True),
)


def contents_page(plans: Sequence[Plan]) -> Page:
    """What a checkpoint holds, from plans that keep all of it: one for each device."""
    first = plans[0]
    names = [step.layer.name for step in first.steps]
    groups = [(group_name(steps, names), steps) for steps in group(first.steps)]
    weights = sum(step.layer.elements for step in first.steps)
    bits = 8 * first.before / weights if weights else 0.0
    data: dict[str, Any] = {
        "source": first.source,
        "format": first.format_name,
        "bytes": first.before,
        "weights": weights,
        "bits_per_weight": round(bits, 3),
        "kv_cache_dtype": first.config.kv_cache_dtype,
        "groups": [_group(name, steps) for name, steps in groups],
        "devices": [_on_device(plan) for plan in plans],
        "notices": list(first.warnings),
    }
    page = Page(data, title=f"quantport inspect {first.source}")
    rows = [
        (
            entry["layers"],
            str(entry["count"]),
            entry["stored_as"],
            f"{entry['bits_per_weight']:.2f}",
            ", ".join(f"{n}x{k}" for n, k in entry["shapes"]) or "-",
            size(entry["bytes"]),
        )
        for entry in data["groups"]
    ]
    page.blocks.append(Grid(_COLUMNS, rows, f"{first.source}: {first.format_name}"))
    page.say("")
    page.say(f"total: {size(first.before)}, {weights:,} weights, {bits:.2f} bits per weight")
    if first.config.kv_cache_dtype:
        page.say(f"KV cache: {first.config.kv_cache_dtype}")
    for device in data["devices"]:
        page.say(f"on {device['device']}: {'; '.join(device['does'])}")
    for text in first.warnings:
        page.say(f"warning: {text}", "warn")
    return page


def stored_as(step: Step) -> str:
    """The scheme of a layer that is stored as codes, where one holds them; the dtype of others."""
    if step.stored and step.requested_scheme:
        return step.requested_scheme
    coded = step.layer.stored_bytes is not None
    return "codes, decoded" if coded else str(step.layer.dtype).removeprefix("torch.")


def _group(name: str, steps: Sequence[Step]) -> dict[str, Any]:
    size, elements = sum(s.before for s in steps), sum(s.layer.elements for s in steps)
    layer = steps[0].layer
    return {
        "layers": name,
        "count": len(steps),
        "stored_as": stored_as(steps[0]),
        "bits_per_weight": 8 * size / elements if elements else 0.0,
        "shapes": list(dict.fromkeys((n, k) for _, n, k in layer.weights)) if layer.is_matrix else [],
        "experts": layer.experts,
        "bytes": size,
    }


def _on_device(plan: Plan) -> dict[str, Any]:
    kept = Counter(
        f"{stored_as(step)} as {step.choice.precision} {str(step.choice.status).replace('_', '-')} by "
        f"{step.choice.kernel} ({step.choice.claim.evidence if step.choice.claim else 'no evidence'}), "
        f"activations {step.choice.activations}"
        for step in plan.quantized
        if step.choice
    )
    does = [f"{count} layer{'s' * (count > 1)} {text}" for text, count in kept.items()]
    return {
        "device": str(plan.device),
        "does": does or ["nothing is quantized: `quantport plan` says what could be"],
        "bytes_after": plan.after,
        "fits": plan.fits,
    }
