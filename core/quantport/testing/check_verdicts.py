"""Checks of what kernels say: every verdict has its reasons or its evidence, and none raises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from quantport.device import Device
from quantport.kernels.base import Kernel, Request, WeightSpec
from quantport.kernels.verdict import Accepted, Reason, ReasonCode, Refusal, Rejected, Status
from quantport.testing import cases
from quantport.testing.check_claims import claim_findings
from quantport.testing.subject import Subject


def devices(subject: Subject) -> dict[str, Device]:
    """Every device that verdicts are asked for: each architecture, simulated and not, one that nobody knows,
    and those here.
    """
    out = {device.arch.name: device for device in subject.simulated}
    some = next(iter(out.values()))
    unknown = replace(
        some.arch, name="unheard_of", title="an architecture of the future", native=frozenset(), source="none"
    )
    out["unheard_of"] = replace(some, arch=unknown, simulated=False)
    return out | {f"{d.arch.name} (here)": d for d in subject.here}


def requests(subject: Subject, device: Device) -> Iterator[Request]:
    """Every request of the check for one device; a simulated one also as if it were found, with no feature
    known.
    """
    twins = {device, replace(device, simulated=False)}
    for one, scheme, (n, k) in product(twins, subject.schemes, cases.PLANNED):
        spec = WeightSpec(scheme, n, k)
        for layer, dtype, rows in product(cases.LAYERS, cases.DTYPES, cases.EXPECTED):
            yield Request(spec, layer, one, dtype, rows)


def check_verdicts(subject: Subject, device: Device) -> None:
    """Every kernel answers every request: with reasons, or with status, precision and evidence.

    Raises:
        AssertionError: a kernel raised, refused without a reason, or accepted without evidence.
    """
    findings: dict[str, None] = {}
    compared = 0
    for kernel in subject.kernels:
        for request in requests(subject, device):
            compared += 1
            findings |= dict.fromkeys(
                f"{kernel.name}, {request.weight.scheme.name}: {f}" for f in _verdict(kernel, request)
            )
    subject.conclude(f"verdicts of {subject.kind} on {device.arch.name}", compared, list(findings))


def _verdict(kernel: Kernel, request: Request) -> list[str]:
    shape = f"[{request.weight.n}, {request.weight.k}] {request.dtype}"
    try:
        serves = kernel.serves(request.weight.scheme) and request.layer in kernel.layers
        reasons, verdict = tuple(kernel.reasons_against(request)) if serves else (), kernel.verdict(request)
    except Exception as error:
        return [f"its verdict raised {type(error).__name__}: {error} ({shape})"]
    if not serves:
        refused = isinstance(verdict, Rejected) and verdict.unrelated
        return [] if refused else ["it accepts a scheme or a layer that it is not for"]
    if isinstance(verdict, Accepted):
        if reasons:
            return [f"it accepts, against its own reasons {reasons} ({shape})"]
        return _accepted(kernel, request, verdict)
    if not isinstance(verdict, Rejected):
        return [f"verdict is a {type(verdict).__name__}, neither Accepted nor Rejected"]
    told = (*reasons, *verdict.reasons)
    if wrong := [r for r in told if not isinstance(r, Reason) or not isinstance(r.kind, Refusal)]:
        return [f"a reason must be Reason(text, kind), with a kind of Refusal, not {wrong[0]!r} ({shape})"]
    if any(reason.code is ReasonCode.RAISED for reason in verdict.reasons):
        return [f"{verdict.reasons[0]} ({shape})"]
    if not verdict.reasons or not all(r.text.strip() for r in told):
        return [f"it refuses without a reason ({shape})"]
    return []


def _accepted(kernel: Kernel, request: Request, verdict: Accepted) -> list[str]:
    scheme = request.weight.scheme
    findings = []
    if verdict.kernel != kernel.name:
        findings.append(f"the verdict is signed {verdict.kernel!r}")
    if verdict.precision not in (scheme.precision, scheme.weight_only.precision):
        findings.append(
            f"precision {verdict.precision} is neither {scheme.precision} nor {scheme.weight_only.precision}"
        )
    if verdict.speed is not None and not verdict.speed > 0:
        findings.append(f"speed {verdict.speed} is not a ratio")
    findings += claim_findings(verdict.claim, kernel, scheme.name, request.device.arch.name)
    return findings + _status(kernel, request, verdict)


def _status(kernel: Kernel, request: Request, verdict: Accepted) -> list[str]:
    scheme, arch = request.weight.scheme, request.device.arch
    if verdict.status is Status.UNSUPPORTED:
        return ["it accepts with the status unsupported"]
    if verdict.precision != scheme.precision and verdict.status is not Status.WEIGHT_ONLY:
        return [
            f"it runs {verdict.precision} where {scheme.precision} was asked: the status must be weight_only"
        ]
    if verdict.status is Status.WEIGHT_ONLY and verdict.precision != scheme.weight_only.precision:
        return [f"status weight_only with precision {verdict.precision}"]
    if verdict.status is not Status.NATIVE:
        return []
    # it multiplies 16-bit activations, as any device can
    if not (kernel.quantizes_activations and scheme.activation):
        return []
    needed = scheme.activation.unit
    return [] if needed in arch.native else [f"status native, but {arch} does not list {needed}"]
