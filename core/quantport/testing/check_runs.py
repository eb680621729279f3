"""Checks of what kernels compute: what they accept runs and is right, what they refuse fails, packing loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantport import numerics
from quantport.capability import Rejected
from quantport.errors import WeightError
from quantport.kernel import Canonical, Kernel, Packed, Request, WeightSpec
from quantport.scheme import Scheme
from quantport.testing import cases
from quantport.testing.subject import Subject


class NotHere(Exception):  # noqa: N818  # not an error: the suite skips
    """Nothing to check here: the kernel takes no such request, or its device is absent and the stand-in cannot run it."""


class Job(NamedTuple):
    """One weight with activations for it, and what the reference makes of them, all on the CPU."""

    spec: WeightSpec
    canonical: Canonical
    x: Tensor
    bias: Tensor | None
    expected: Tensor


def make_job(spec: WeightSpec, weight: Tensor, x: Tensor, bias: Tensor | None, quantizes: bool) -> Job:
    """Asks the reference. A kernel that leaves activations in 16 bits is judged by the weight-only numerics."""
    canonical = numerics.quantize_weight(weight, spec.scheme)
    scheme = spec.scheme if quantizes else spec.scheme.weight_only
    return Job(spec, canonical, x, bias, numerics.linear(x, canonical, scheme, bias))


@lru_cache(maxsize=256)
def _plain(spec: WeightSpec, dtype: torch.dtype, biased: bool, rows: int, quantizes: bool) -> Job:
    bias = cases.bias(spec.n, dtype) if biased else None
    return make_job(spec, cases.plain(spec.n, spec.k), cases.activations(rows, spec.k, dtype), bias, quantizes)


def plain_job(request: Request, biased: bool, rows: int, quantizes: bool) -> Job:
    """An ordinary weight. Tokens are independent in most schemes: then fewer rows are a part of the most rows."""
    activation = request.weight.scheme.activation
    whole = activation is not None and activation.rows != 1
    job = _plain(request.weight, request.dtype, biased, rows if whole else max(cases.ROWS), quantizes)
    return job._replace(x=job.x[:rows], expected=job.expected[:rows])


def compare(kernel: Kernel, job: Job, where: torch.device) -> str:
    """Runs a kernel and compares it with the reference.

    Returns:
        What is wrong, or an empty string. What the reference itself cannot say (its result is not finite) is not wrong.
    """
    packed = kernel.pack({name: t.to(where, copy=True) for name, t in job.canonical.items()}, job.spec)
    before = [t.clone() for t in packed]
    x, bias = job.x.to(where, copy=True), None if job.bias is None else job.bias.to(where, copy=True)
    y, expected = kernel.run(x, packed, bias, job.spec), job.expected
    if tuple(y.shape) != tuple(expected.shape) or y.dtype != expected.dtype or y.device.type != where.type:
        return f"returned {list(y.shape)} {y.dtype} on {y.device}, not {list(expected.shape)} {expected.dtype} on {where}"
    if not cases.same_bits(x, job.x) or not all(map(cases.same_bits, packed, before)):
        return "run changed its activations or its packed weight"
    if not torch.isfinite(expected).all():
        return ""
    error = cases.relative_error(y, expected)
    return "" if error <= kernel.tolerance else f"relative error {error:.2e} is over the tolerance {kernel.tolerance:.2e}"


def _judge(subject: Subject, kernel: Kernel, request: Request, job: Job) -> str:
    where = subject.place(request.device)
    if where is None:
        raise NotHere(f"no device of kind {subject.kind} here, and no stand-in")
    try:
        wrong = compare(kernel, job, where)
    except Exception as error:
        if request.device.simulated:  # not its device: only a wrong result says something
            raise NotHere(f"{kernel.name} does not run on {where}: {type(error).__name__}: {error}") from None
        wrong = f"raised {type(error).__name__}: {error}"
    title = f"[{job.spec.n}, {job.spec.k}] {job.x.dtype} x {job.x.shape[0]} rows, {'no ' if job.bias is None else ''}bias"
    return wrong and f"{title}: {wrong}"


def check_accepted(subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
    """What the kernel accepts runs, for any number of rows, and meets the reference within its tolerance.

    Raises:
        AssertionError: it raised, or is wrong.
        NotHere: it accepts nothing of this scheme and dtype, or cannot run here.
    """
    takes = subject.accepted(kernel, scheme, dtype)
    if not takes:
        raise NotHere(f"{kernel.name} takes no {scheme.name} in {dtype} here")
    findings = [
        wrong
        for request in takes.values()
        for rows in cases.ROWS
        for biased in (False, True)
        if (wrong := _judge(subject, kernel, request, plain_job(request, biased, rows, kernel.quantizes_activations)))
    ]
    cases.fail(f"{kernel.name} accepts {scheme.name} in {dtype}", findings)


def check_special(subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
    """Weights of zeros, outliers, one sign, or tiny and huge values come out as the reference says.

    Raises:
        AssertionError: it raised, or is wrong.
        NotHere: as for ``check_accepted``.
    """
    takes = subject.accepted(kernel, scheme, dtype)
    if not takes:
        raise NotHere(f"{kernel.name} takes no {scheme.name} in {dtype} here")
    spec, request = max(takes.items(), key=lambda item: item[0].n * item[0].k)
    findings = []
    for name, make in cases.SPECIAL.items():
        job = make_job(spec, make(spec.n, spec.k), cases.activations(5, spec.k, dtype), None, kernel.quantizes_activations)
        wrong = _judge(subject, kernel, request, job)
        findings += [f"{name}: {wrong}"] if wrong else []
    cases.fail(f"{kernel.name} on special weights of {scheme.name} in {dtype}", findings)


def _refused(subject: Subject, kernel: Kernel, scheme: Scheme) -> Iterator[tuple[Request, tuple[str, ...]]]:
    for device in subject.here:
        for dtype in cases.DTYPES:
            asked = list(subject.requests(scheme, dtype, device))
            for spec, layer in dict.fromkeys((r.weight, r.layer) for r in asked):
                verdicts = [kernel.verdict(r) for r in asked if (r.weight, r.layer) == (spec, layer)]
                if all(isinstance(v, Rejected) for v in verdicts):
                    reasons = tuple(dict.fromkeys(r for v in verdicts if isinstance(v, Rejected) for r in v.reasons))
                    yield Request(spec, layer, device, dtype), reasons


def check_refused(subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
    """What the kernel refuses on a device that is here does fail, unless policy refuses it.

    The kernel is called all the same. It must raise or be wrong; a refusal that would succeed is an untrue reason.

    Raises:
        AssertionError: a refused call succeeds for every number of rows.
    """
    findings = []
    for request, reasons in _refused(subject, kernel, scheme):
        if any(phrase in reason for reason in reasons for phrase in subject.policy):
            continue
        jobs = (plain_job(request, True, rows, kernel.quantizes_activations) for rows in cases.ROWS)
        if not any(_judge(subject, kernel, request, job) for job in jobs):
            spec = request.weight
            findings.append(f"[{spec.n}, {spec.k}] {request.dtype} for {request.layer} runs and is right, against {list(reasons)}")
    cases.fail(f"{kernel.name} refuses {scheme.name}, yet it works (if that is policy, say so in `policy`)", findings)


def check_packing(subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
    """``unpack`` is the exact inverse of ``pack``, for every weight that the kernel takes; neither changes its input.

    Raises:
        AssertionError: a bit differs.
        NotHere: as for ``check_accepted``.
    """
    takes = [(spec, r) for dtype in cases.DTYPES for spec, r in subject.accepted(kernel, scheme, dtype).items()]
    if not takes:
        raise NotHere(f"{kernel.name} takes no {scheme.name} here")
    findings: list[str] = []
    for spec, request in takes:
        where = subject.place(request.device)
        if where is None:
            raise NotHere(f"no device of kind {subject.kind} here, and no stand-in")
        for name, make in cases.SPECIAL.items():
            canonical = {key: t.to(where) for key, t in numerics.quantize_weight(make(spec.n, spec.k), scheme).items()}
            findings += [f"[{spec.n}, {spec.k}] {name}: {wrong}" for wrong in _round_trip(kernel, spec, canonical, request)]
    cases.fail(f"packing of {scheme.name} by {kernel.name}", list(dict.fromkeys(findings)))


def _round_trip(kernel: Kernel, spec: WeightSpec, canonical: Canonical, request: Request) -> list[str]:
    before = {name: t.clone() for name, t in canonical.items()}
    try:
        packed: Packed = kernel.pack(canonical, spec)
        back = kernel.unpack(packed, spec)
    except Exception as error:
        if request.device.simulated:
            raise NotHere(f"{kernel.name} does not pack on the stand-in: {type(error).__name__}: {error}") from None
        return [f"raised {type(error).__name__}: {error}"]
    findings = [] if isinstance(packed, tuple) else [f"pack returned a {type(packed).__name__}, not a tuple of tensors"]
    findings += [f"pack changed {name}" for name, t in canonical.items() if not cases.same_bits(t, before[name])]
    if set(back) != set(before):
        return [*findings, f"unpack returned {sorted(back)}, not {sorted(before)}"]
    return findings + [f"unpack gives another {name}" for name, t in before.items() if not cases.same_bits(t, back[name])]


def check_reference(subject: Subject, scheme: Scheme) -> None:
    """The reference quantizes to the same bits on the devices here as on the CPU, since weights are quantized there.

    Raises:
        AssertionError: a bit differs.
    """
    findings = []
    for device in subject.here:
        for name, make in cases.SPECIAL.items():
            weight = make(48, 200)
            try:
                there = numerics.quantize_weight(weight.to(device.torch_device), scheme)
            except WeightError as error:
                findings.append(f"{name} on {device}: {error}")
                continue
            here = numerics.quantize_weight(weight, scheme)
            findings += [f"{name} on {device}: {key} differs" for key in here if not cases.same_bits(here[key], there[key])]
    cases.fail(f"reference of {scheme.name}", findings)
