"""The page of a plan: one row for each group of like layers, then totals, reasons and warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from quantport.cli.page import Column, Grid, Page, size
from quantport.model.patterns import compile_pattern
from quantport.model.roles import Role
from quantport.planning.decode_step import head_share
from quantport.planning.fit import advice, shortage
from quantport.planning.plan import Plan
from quantport.planning.select_kernel import Choice, speed_text
from quantport.planning.steps import Step

OTHERS = "other tensors (norms, biases)"
_COLUMNS = (
    Column("layers"),
    Column("count", right=True),
    Column("asked", 2),
    Column("effective"),
    Column("activations", 4),
    Column("kernel", 1),
    Column("evidence", 6),
    Column("n x k", 7),
    Column("before", 5, right=True),
    Column("after", 3, right=True),
)


def plan_page(plan: Plan) -> Page:
    """Everything that a plan says; the data are those of the plan, with groups, reasons and warnings."""
    groups = group(plan.steps)
    names = [step.layer.name for step in plan.steps]
    named = [(group_name(steps, names), steps) for steps in groups]
    page = Page({**plan.to_dict(), **_summary(plan, named)}, title=f"quantport plan {plan.source}")
    page.blocks.append(
        Grid(_COLUMNS, [_row(name, steps) for name, steps in named], f"{plan.source} on {plan.device}")
    )
    page.say("")
    saved = 1 - plan.after / plan.before if plan.before else 0
    totals = f"total: {size(plan.before)} -> {size(plan.after)} ({saved:.0%} less)"
    stored = sum(step.stored for step in plan.quantized)
    counts = f"{len(plan.quantized) - stored} layers quantized" + (
        f", {stored} kept as stored" if stored else ""
    )
    page.say(f"{totals}, peak while loading at most {size(plan.peak)}, {counts}")
    if text := _kv_line(plan):
        page.say(text)
    if head := head_share(plan):
        page.say(f"output head: {head}")
    if plan.why:
        page.say(f"scheme chosen for this device: {plan.why}")
    for text in page.data["speed"]:
        page.say(f"speed: {text}")
    for text in page.data["quality"]:
        page.say(f"quality: {text}")
    for text in page.data["kept"]:
        page.say(f"kept in 16 bits: {text}")
    for text in page.data["reasons"]:
        page.say(f"reason: {text}")
    for text in page.data["warnings"]:
        page.say(f"warning: {text}", "warn")
    if text := shortage(plan):
        page.say(f"does not fit: {text}; try {advice(plan)}", "warn")
    return page


def _kv_line(plan: Plan) -> str:
    """What one token takes in the KV cache; empty where nothing was asked and nothing is known."""
    kv = plan.kv_cache
    per_token, bf16, dtype = kv["bytes_per_token"], kv["bytes_per_token_bf16"], kv["dtype"]
    if per_token is None:
        return "" if dtype == "auto" else f"KV cache: {dtype}; its size is not known from config.json"
    if dtype == "auto":
        return f"KV cache: {bf16} bytes per token, in 16 bits"
    skips = f"; layers {', '.join(map(str, kv['skip_layers']))} in 16 bits" if kv["skip_layers"] else ""
    return (
        f"KV cache: {bf16} -> {per_token} bytes per token ({1 - per_token / bf16:.0%} less), {dtype}{skips}"
    )


def group(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps that share everything but their place in the model: name, shape, scheme and what they get."""
    out: dict[object, list[Step]] = {}
    for step in steps:
        layer = step.layer
        other = not layer.is_matrix
        leaf = "" if other else layer.name.rpartition(".")[2]
        leaf = "expert" if leaf.isdecimal() else leaf
        shape = (
            ()
            if other
            else (layer.weights, layer.experts, len(layer.only), layer.dtype, layer.name.count("."))
        )
        out.setdefault((layer.kind, leaf, shape, step.requested_scheme, step.choice, step.note), []).append(
            step
        )
    return list(out.values())


def group_name(steps: Sequence[Step], names: Sequence[str]) -> str:
    """The layers of a group as the glob that ``--ignore`` takes, where one names exactly them; else with what
    differs in braces.
    """
    own = [step.layer.name for step in steps]
    if not steps[0].layer.is_matrix:
        return OTHERS
    if len(own) == 1:
        return own[0]
    columns = [set(parts) for parts in zip(*(name.split(".") for name in own), strict=True)]
    pattern = ".".join(next(iter(parts)) if len(parts) == 1 else "*" for parts in columns)
    matches = compile_pattern(pattern).match
    if {name for name in names if matches(name)} == set(own):
        return pattern
    return ".".join(next(iter(parts)) if len(parts) == 1 else _braced(parts) for parts in columns)


def _braced(parts: set[str]) -> str:
    """``{0-3}``, or ``{1,3,...,9}``."""
    if not all(part.isdecimal() for part in parts):
        return "{" + ",".join(sorted(parts)[:3]) + (",...}" if len(parts) > 3 else "}")
    numbers = sorted(map(int, parts))
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return (
        "{"
        + (
            ",".join(map(str, numbers))
            if len(numbers) < 5
            else f"{numbers[0]},{numbers[1]},...,{numbers[-1]}"
        )
        + "}"
    )


def _row(name: str, steps: Sequence[Step]) -> tuple[str, ...]:
    first = steps[0]
    choice, layer = first.choice, first.layer
    shapes = ", ".join(dict.fromkeys(f"{n}x{k}" for _, n, k in layer.weights)) if layer.is_matrix else "-"
    held = f"{len(layer.only)} weights" if layer.only else f"{layer.experts} experts"
    shapes = f"{held} of {shapes}" if layer.experts else shapes
    sizes = (size(sum(s.before for s in steps)), size(sum(s.after for s in steps)))
    known = (
        (_effective(choice), choice.activations, choice.kernel, _evidence(choice))
        if choice
        else ("as stored", "-", "-", "-")
    )
    return name, str(len(steps)), first.requested_scheme or "-", *known, shapes, *sizes


def _effective(choice: Choice) -> str:
    return f"{choice.precision} {str(choice.status).replace('_', '-')}"


def _evidence(choice: Choice) -> str:
    return str(choice.claim.evidence) if choice.claim else "-"


def _summary(plan: Plan, named: Sequence[tuple[str, Sequence[Step]]]) -> dict[str, Any]:
    """What the groups share, for people and machines."""
    kept = [
        (name, steps) for name, steps in named if not steps[0].requested_scheme and steps[0].layer.is_matrix
    ]
    return {
        "fallback": plan.config.fallback,
        "groups": [_group_dict(name, steps) for name, steps in named],
        "head": {**asdict(head), "share": head.share} if (head := head_share(plan)) else None,
        "speed": _speed(plan),
        "quality": _quality(plan),
        "kept": _told(kept, lambda step: [step.note]),
        "reasons": _reasons(plan),
        "warnings": [
            *plan.warnings,
            *_told([(name, steps) for name, steps in named if steps[0].slow], lambda step: [step.note]),
        ],
    }


def _speed(plan: Plan) -> list[str]:
    """How fast each scheme is as it runs here; and what measures it where nobody did, at the largest of these
    layers.
    """
    alike: dict[tuple[str, ...], list[Step]] = {}
    for step in plan.quantized:
        if step.choice and (step.layer.role is not Role.EMBEDDING or step.layer.tied):
            known = speed_text(step.choice, plan.num_tokens)
            about = (step.scheme, step.choice.precision, step.choice.kernel, known)
            alike.setdefault(about, []).append(step)
    out = []
    for (name, precision, kernel, known), steps in alike.items():
        choice, (_, n, k) = steps[0].choice, max(_shapes(steps), key=lambda shape: shape[1] * shape[2])
        unknown = choice and choice.speed is None and not choice.slow
        how = f"; `quantport bench --scheme {name} --size {n} {k} --save` measures it" if unknown else ""
        count = f"{len(steps)} layer{'s' * (len(steps) > 1)}"
        out.append(f"{name} as {precision} by {kernel} ({count}): {known}{how}")
    return out


def _shapes(steps: Sequence[Step]) -> list[tuple[str, int, int]]:
    return [shape for step in steps for shape in step.layer.weights]


def _quality(plan: Plan) -> list[str]:
    """What each scheme costs, as it runs here, on a real model."""
    choices = [(s.requested_scheme, s.choice) for s in plan.quantized if s.choice]
    found = {(name, c.precision): c.quality for name, c in choices}
    return [
        f"{name} as {precision}: {quality or 'not known'}" for (name, precision), quality in found.items()
    ]


def _reasons(plan: Plan) -> list[str]:
    """Why layers do not get what was asked, each once."""
    out: dict[str, None] = {}
    for step in plan.quantized:
        if step.choice is None:
            continue
        out.update(dict.fromkeys(f"{step.requested_scheme}: {reason}" for reason in step.choice.reasons))
        if step.choice.numeric_deviation:
            out[f"{step.requested_scheme} deviates from the scheme: {step.choice.numeric_deviation}"] = None
    return list(out)


def _told(named: Sequence[tuple[str, Sequence[Step]]], texts: Callable[[Step], Sequence[str]]) -> list[str]:
    """Each text once, after the groups that it is about."""
    about: dict[str, list[str]] = {}
    for name, steps in named:
        for text in texts(steps[0]):
            about.setdefault(text, []).append(name)
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more groups' if names[3:] else ''}: {t}"
        for t, names in about.items()
    ]


def _group_dict(name: str, steps: Sequence[Step]) -> dict[str, Any]:
    first = steps[0]
    choice, layer = first.choice, first.layer
    return {
        "layers": name,
        "count": len(steps),
        "kind": layer.kind,
        "shapes": [{"weight": w, "n": n, "k": k} for w, n, k in layer.weights] if layer.is_matrix else [],
        "experts": layer.experts,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "asked": first.requested_scheme,
        "status": str(choice.status) if choice else "kept",
        "precision": choice.precision if choice else None,
        "activations": choice.activations if choice else None,
        "kernel": choice.kernel if choice else None,
        "evidence": _evidence(choice) if choice else None,
        "slow": first.slow,
        "note": first.note,
        "bytes_before": sum(s.before for s in steps),
        "bytes_after": sum(s.after for s in steps),
    }
