"""Checks of what kernels compute: what they accept runs and is right, what they refuse fails, packing loses nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


@lru_cache(maxsize=1024)
def special(spec: WeightSpec, name: str) -> Canonical:
    """The stored tensors of a special weight, shared by the checks: whoever hands them on copies them."""
    return numerics.quantize_weight(cases.SPECIAL[name](spec.n, spec.k), spec.scheme)


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


def compare(kernel: Kernel, jobs: Sequence[Job], where: torch.device) -> str:
    """Packs the weight that the jobs share, runs each, and compares with the reference.

    Returns:
        What is wrong with the first bad one, or an empty string. What the reference itself cannot say (its result is not
        finite) is not wrong.
    """
    first = jobs[0]
    packed = kernel.pack({name: t.to(where, copy=True) for name, t in first.canonical.items()}, first.spec)
    before = [cases.kept(t) for t in packed]
    for job in jobs:
        x, bias = job.x.to(where, copy=True), None if job.bias is None else job.bias.to(where, copy=True)
        wrong = _result(kernel.run(x, packed, bias, job.spec), job, where, kernel.tolerance)
        if wrong or not cases.same_bits(x, job.x):
            shape = f"[{job.spec.n}, {job.spec.k}] {x.dtype} x {x.shape[0]} rows, {'no ' if bias is None else ''}bias"
            return f"{shape}: {wrong or 'run changed its activations'}"
    return "" if all(map(cases.same_bits, packed, before)) else "run changed its packed weight"


def _result(y: Tensor, job: Job, where: torch.device, tolerance: float) -> str:
    expected = job.expected
    if tuple(y.shape) != tuple(expected.shape) or y.dtype != expected.dtype or y.device.type != where.type:
        return f"returned {list(y.shape)} {y.dtype} on {y.device}, not {list(expected.shape)} {expected.dtype} on {where}"
    error = cases.relative_error(y, expected) if torch.isfinite(expected).all() else 0.0
    return "" if error <= tolerance else f"relative error {error:.2e} is over the tolerance {tolerance:.2e}"


def _judge(subject: Subject, kernel: Kernel, request: Request, jobs: Sequence[Job]) -> str:
    where = subject.place(request.device)
    if where is None:
        raise NotHere(f"no device of kind {subject.kind} here, and no stand-in")
    try:
        return compare(kernel, jobs, where)
    except Exception as error:
        if request.device.simulated:  # not its device: only a wrong result says something
            raise NotHere(f"{kernel.name} does not run on {where}: {type(error).__name__}: {error}") from None
        return f"[{request.weight.n}, {request.weight.k}] {request.dtype}: raised {type(error).__name__}: {error}"


def _plain_jobs(request: Request, kernel: Kernel) -> list[Job]:
    return [plain_job(request, biased, rows, kernel.quantizes_activations) for biased in (False, True) for rows in cases.ROWS]


def check_accepted(subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
    """What the kernel accepts runs, for any number of rows, and meets the reference within its tolerance.

    Raises:
        AssertionError: it raised, or is wrong.
        NotHere: it accepts nothing of this scheme and dtype, or cannot run here.
    """
    takes = subject.accepted(kernel, scheme, dtype)
    if not takes:
        raise NotHere(f"{kernel.name} takes no {scheme.name} in {dtype} here")
    findings = [wrong for r in takes.values() if (wrong := _judge(subject, kernel, r, _plain_jobs(r, kernel)))]
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
    spec, request = min(takes.items(), key=lambda item: abs(item[0].n * item[0].k - 9600))  # [48, 200] where it may
    findings = []
    for name, make in cases.specials(scheme):
        job = make_job(spec, make(spec.n, spec.k), cases.activations(5, spec.k, dtype), None, kernel.quantizes_activations)
        wrong = _judge(subject, kernel, request, [job])
        findings += [f"{name}: {wrong}"] if wrong else []
    cases.fail(f"{kernel.name} on special weights of {scheme.name} in {dtype}", findings)


def _refused(subject: Subject, kernel: Kernel, scheme: Scheme) -> Iterator[tuple[Request, tuple[str, ...]]]:
    for device in subject.here:
        for dtype in cases.DTYPES:
            asked = list(subject.requests(scheme, dtype, device))
            for spec, layer in dict.fromkeys((r.weight, r.layer) for r in asked if r.layer in kernel.layers):
                verdicts = [kernel.verdict(r) for r in asked if (r.weight, r.layer) == (spec, layer)]
                if all(isinstance(v, Rejected) for v in verdicts):
                    reasons = tuple(dict.fromkeys(r for v in verdicts if isinstance(v, Rejected) for r in v.reasons))
                    yield Request(spec, layer, device, dtype), reasons


def check_refused(subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
    """What the kernel refuses on a device that is here does fail, unless policy refuses it.

    The kernel is called all the same. It must raise or be wrong; a refusal that would succeed is an untrue reason.

    Raises:
        AssertionError: a refused call succeeds for every number of rows.
        NotHere: the kernel is for other schemes.
    """
    if not kernel.serves(scheme):
        raise NotHere(f"{kernel.name} is not for {scheme.name}")
    findings = []
    for request, reasons in _refused(subject, kernel, scheme):
        if any(phrase in reason for reason in reasons for phrase in subject.policy):
            continue
        if not _judge(subject, kernel, request, _plain_jobs(request, kernel)):
            spec = request.weight
            findings.append(f"[{spec.n}, {spec.k}] {request.dtype} for {request.layer} runs and is right, against {list(reasons)}")
    cases.fail(f"{kernel.name} refuses {scheme.name}, yet it works (if that is policy, say so in `policy`)", findings)


def check_packing(subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
    """``unpack`` is the exact inverse of ``pack``, for every weight that the kernel takes; neither changes its input.

    Raises:
        AssertionError: a bit differs.
        NotHere: as for ``check_accepted``.
    """
    takes = {spec: r for dtype in cases.DTYPES for spec, r in subject.accepted(kernel, scheme, dtype).items()}
    if not takes:
        raise NotHere(f"{kernel.name} takes no {scheme.name} here")
    findings: list[str] = []
    for spec, request in takes.items():
        where = subject.place(request.device)
        if where is None:
            raise NotHere(f"no device of kind {subject.kind} here, and no stand-in")
        for name, _ in cases.specials(scheme):
            canonical = {key: t.to(where, copy=True) for key, t in special(spec, name).items()}
            findings += [f"[{spec.n}, {spec.k}] {name}: {wrong}" for wrong in _round_trip(kernel, spec, canonical, request)]
    cases.fail(f"packing of {scheme.name} by {kernel.name}", list(dict.fromkeys(findings)))


def _round_trip(kernel: Kernel, spec: WeightSpec, canonical: Canonical, request: Request) -> list[str]:
    before = {name: cases.kept(t) for name, t in canonical.items()}
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
        NotHere: a device only stores a dtype of the scheme: such weights are quantized on the host.
    """
    findings = []
    for device in subject.here:
        if any(dtype in device.arch.opaque for _, dtype in scheme.layout(48, 200).values()):
            raise NotHere(f"{device} only stores a dtype of {scheme.name}")
        for name, make in cases.specials(scheme):
            weight = make(48, 200)
            weight = weight.float() if weight.dtype in device.arch.opaque else weight
            try:
                there = numerics.quantize_weight(weight.to(device.torch_device), scheme)
            except WeightError as error:
                findings.append(f"{name} on {device}: {error}")
                continue
            here = numerics.quantize_weight(weight, scheme)
            findings += [f"{name} on {device}: {key} differs" for key in here if not cases.same_bits(here[key], there[key])]
    cases.fail(f"reference of {scheme.name}", findings)
