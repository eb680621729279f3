"""Whether a plan fits the memory that is free, and what would where it does not."""

from __future__ import annotations

from quantport.planning.plan import Plan

_SMALL = "int4_mse"
_GIB = 1 << 30


def shortage(plan: Plan, peak: int | None = None) -> str:
    """What is needed and what is free, where that is less; empty where it fits, or nobody knows.

    Args:
        plan: For a device that is here: of a simulated one the memory is not known.
        peak: Bytes that are needed at most; by default those of loading.
    """
    peak, free = plan.peak if peak is None else peak, plan.device.memory
    if free is None or peak <= free:
        return ""
    needs = f"it needs {peak / _GIB:.1f} GiB, {plan.budget / _GIB:.1f} of them to stream"
    return f"{needs}; {free / _GIB:.1f} GiB are free"


def advice(plan: Plan) -> str:
    """What to do about a shortage: never what was asked for already."""
    schemes = {step.requested_scheme for step in plan.quantized}
    out = []
    if schemes - {_SMALL} and any(step.after > step.layer.elements * 0.6 for step in plan.quantized):
        out.append(f"a scheme with fewer bits ({_SMALL})")
    if plan.device.memory is not None and plan.after < plan.device.memory:
        out.append(f"budget= of at most {plan.device.memory - plan.after} bytes")
    return ", or ".join([*out, "a device with more memory"])
