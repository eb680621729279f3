"""Checks of what kernels say: every verdict has its reasons or its evidence, and none raises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from quantport.capability import Accepted, Evidence, Rejected, Status
from quantport.device import Device
from quantport.kernel import Kernel, Request, WeightSpec
from quantport.testing import cases
from quantport.testing.subject import Subject


def devices(subject: Subject) -> dict[str, Device]:
    """Every device that verdicts are asked for: each architecture, simulated and not, one that nobody knows, and those here."""
    out = {device.arch.name: device for device in subject.simulated}
    some = next(iter(out.values()))
    unknown = replace(some.arch, name="unheard_of", title="an architecture of the future", native=frozenset(), source="none")
    out["unheard_of"] = replace(some, arch=unknown, simulated=False)
    return out | {f"{d.arch.name} (here)": d for d in subject.here}


def requests(subject: Subject, device: Device) -> Iterator[Request]:
    """Every request of the check for one device; a simulated one also as if it were found, with no feature known."""
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
    for kernel in subject.kernels:
        for request in requests(subject, device):
            findings |= dict.fromkeys(f"{kernel.name}, {request.weight.scheme.name}: {f}" for f in _verdict(kernel, request))
    cases.fail(f"verdicts of {subject.kind} on {device.arch.name}", list(findings))


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
    if any("the kernel raised" in reason for reason in verdict.reasons):
        return [f"{verdict.reasons[0]} ({shape})"]
    if not verdict.reasons or not all(isinstance(r, str) and r.strip() for r in (*reasons, *verdict.reasons)):
        return [f"it refuses without a reason ({shape})"]
    return []


def _accepted(kernel: Kernel, request: Request, verdict: Accepted) -> list[str]:
    scheme = request.weight.scheme
    findings = []
    if verdict.kernel != kernel.name:
        findings.append(f"the verdict is signed {verdict.kernel!r}")
    if verdict.precision not in (scheme.precision, scheme.weight_only.precision):
        findings.append(f"precision {verdict.precision} is neither {scheme.precision} nor {scheme.weight_only.precision}")
    if verdict.speed is not None and not verdict.speed > 0:
        findings.append(f"speed {verdict.speed} is not a ratio")
    source = verdict.claim.source.strip()
    if not source:
        findings.append("the claim has no source")
    if verdict.claim.evidence is Evidence.MEASURED and not re.search(r"\w\.(json|md|csv|txt|log)\b|https?://", source):
        findings.append(f"a measured claim must name its results file, not {source!r}")
    return findings + _status(kernel, request, verdict)


def _status(kernel: Kernel, request: Request, verdict: Accepted) -> list[str]:
    scheme, arch = request.weight.scheme, request.device.arch
    if verdict.status is Status.UNSUPPORTED:
        return ["it accepts with the status unsupported"]
    if verdict.precision != scheme.precision and verdict.status is not Status.WEIGHT_ONLY:
        return [f"it runs {verdict.precision} where {scheme.precision} was asked: the status must be weight_only"]
    if verdict.status is Status.WEIGHT_ONLY and verdict.precision != scheme.weight_only.precision:
        return [f"status weight_only with precision {verdict.precision}"]
    if verdict.status is not Status.NATIVE:
        return []
    if not (kernel.quantizes_activations and scheme.activation):  # it multiplies 16-bit activations, as any device can
        return []
    needed = scheme.activation.unit
    return [] if needed in arch.native else [f"status native, but {arch} does not list {needed}"]


def check_policy(subject: Subject) -> None:
    """Every refusal of policy is still one that some kernel makes, and says why.

    Raises:
        AssertionError: an entry is stale or has no reason.
    """
    unsaid = dict.fromkeys(subject.policy)
    for kernel, device in product(subject.kernels, devices(subject).values() if subject.policy else ()):
        for request in requests(subject, device) if unsaid else ():
            verdict = kernel.verdict(request)
            said = verdict.reasons if isinstance(verdict, Rejected) else ()
            unsaid = {phrase: None for phrase in unsaid if not any(phrase in reason for reason in said)}
    findings = [f"{phrase!r}: no refusal says so any more" for phrase in unsaid]
    findings += [f"{phrase!r} has no reason" for phrase, why in subject.policy.items() if not why.strip()]
    cases.fail(f"policy of {subject.kind}", findings)
