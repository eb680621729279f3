"""Checks of what kernels compute: what they accept runs and is right, and packing loses nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantport import numerics
from quantport.errors import ConfigError, WeightError
from quantport.kernels.base import Kernel, Packed, Request, StoredWeight, WeightSpec
from quantport.kernels.packing import pack_steps
from quantport.kernels.wrapped import kernel_for
from quantport.numerics.by_rows import QuantizedRows, stored_slices
from quantport.numerics.sharding import alignment
from quantport.scheme import Scheme
from quantport.scheme.scheme import INPUT_ZERO
from quantport.testing import cases, weights
from quantport.testing.subject import NotHere, Subject


class Job(NamedTuple):
    """One weight with activations for it, and what the reference makes of them, all on the CPU."""

    spec: WeightSpec
    stored_weight: StoredWeight
    x: Tensor
    bias: Tensor | None
    expected: Tensor


def make_job(
    spec: WeightSpec, stored_weight: StoredWeight, x: Tensor, bias: Tensor | None, quantizes: bool
) -> Job:
    """Asks the reference. A kernel that leaves activations in 16 bits is judged by the weight-only
    numerics.
    """
    scheme = spec.scheme if quantizes else spec.scheme.weight_only
    return Job(spec, stored_weight, x, bias, numerics.linear(x, stored_weight, scheme, bias))


@lru_cache(maxsize=256)
def _plain(spec: WeightSpec, dtype: torch.dtype, biased: bool, rows: int, quantizes: bool) -> Job:
    bias = cases.bias(spec.n, dtype) if biased else None
    return make_job(spec, weights.plain(spec), cases.activations(rows, spec.k, dtype), bias, quantizes)


def plain_jobs(request: Request, quantizes: bool, rows: Sequence[int]) -> list[Job]:
    """An ordinary weight with and without a bias, for each number of rows.

    Tokens are independent in most schemes: then fewer rows are a part of the most rows.
    """
    activation = request.weight.scheme.activation
    whole = activation is not None and activation.block_shape[0] != 1
    jobs = []
    for biased in (False, True):
        for count in rows:
            job = _plain(request.weight, request.dtype, biased, count if whole else max(rows), quantizes)
            jobs.append(job._replace(x=job.x[:count], expected=job.expected[:count]))
    return jobs


def compare(kernel: Kernel, jobs: Sequence[Job], where: torch.device) -> str:
    """Packs the weight that the jobs share, runs each, and compares with the reference.

    Returns:
        What is wrong with the first bad one, or an empty string. What the reference itself cannot say (its
        result is not finite) is not wrong.
    """
    first = jobs[0]
    packed = kernel.pack(
        {name: t.to(where, copy=True) for name, t in first.stored_weight.items()}, first.spec
    )
    before = [cases.kept(t) for t in packed]
    for job in jobs:
        x, bias = job.x.to(where, copy=True), None if job.bias is None else job.bias.to(where, copy=True)
        wrong = _result(kernel.run(x, packed, bias, job.spec), job, where, kernel.tolerance)
        if not wrong and bias is None and x.shape[0] == 1 and not job.spec.scheme.rotation:
            function = kernel.row_function(packed, job.spec)
            y = None if function is None else function(x)
            wrong = "" if y is None else _result(y, job, where, kernel.tolerance)
            wrong = wrong and f"row_function {wrong}"
        if wrong or not cases.same_bits(x, job.x):
            shape = (
                f"[{job.spec.n}, {job.spec.k}] {x.dtype} x {x.shape[0]} rows, "
                f"{'no ' if bias is None else ''}bias"
            )
            return f"{shape}: {wrong or 'run changed its activations'}"
    return "" if all(map(cases.same_bits, packed, before)) else "run changed its packed weight"


def _result(y: Tensor, job: Job, where: torch.device, tolerance: float) -> str:
    expected = job.expected
    if tuple(y.shape) != tuple(expected.shape) or y.dtype != expected.dtype or y.device.type != where.type:
        return (
            f"returned {list(y.shape)} {y.dtype} on {y.device}, not {list(expected.shape)} "
            f"{expected.dtype} on {where}"
        )
    error = cases.relative_error(y, expected) if torch.isfinite(expected).all() else 0.0
    return "" if error <= tolerance else f"relative error {error:.2e} is over the tolerance {tolerance:.2e}"


def _judge(kernel: Kernel, request: Request, jobs: Sequence[Job], where: torch.device) -> str:
    try:
        return compare(kernel, jobs, where)
    except Exception as error:
        if request.device.simulated:  # not its device: only a wrong result says something
            raise NotHere(f"{kernel.name} does not run on {where}: {type(error).__name__}: {error}") from None
        return (
            f"[{request.weight.n}, {request.weight.k}] {request.dtype}: raised {type(error).__name__}: "
            f"{error}"
        )


def _judge_all(
    subject: Subject, kernel: Kernel, batches: Iterable[tuple[str, Request, Sequence[Job]]], title: str
) -> None:
    """Judges batches of jobs, each with a name that goes before what is found.

    Raises:
        AssertionError: something is wrong.
        NotHere: nothing is, and the stand-in ran none of them.
    """
    findings, compared, absent = [], 0, ""
    for name, request, jobs in batches:
        try:
            wrong = _judge(kernel, request, jobs, subject.place(request.device))
        except NotHere as reason:
            absent = str(reason)
            continue
        compared += len(jobs)
        findings += [name + wrong] if wrong else []
    if absent and not compared:
        raise NotHere(absent)
    subject.conclude(title, compared, findings)


def _accepted(
    subject: Subject, kernel: Kernel, scheme: Scheme, *dtypes: torch.dtype
) -> dict[WeightSpec, Request]:
    takes = {spec: r for dtype in dtypes for spec, r in subject.accepted(kernel, scheme, dtype).items()}
    if not takes:
        raise NotHere(f"{kernel.name} takes no {scheme.name} in {', '.join(map(str, dtypes))} here")
    return takes


def check_accepted(subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
    """What the kernel accepts runs, for any number of rows, and meets the reference within its tolerance;
    with a stored scale of activations too, where it multiplies codes.

    Raises:
        AssertionError: it raised, or is wrong.
        NotHere: it accepts nothing of this scheme and dtype, or cannot run here.
    """
    takes = _accepted(subject, kernel, scheme, dtype)
    batches = (("", r, plain_jobs(r, kernel.quantizes_activations, subject.rows)) for r in takes.values())
    _judge_all(subject, kernel, batches, f"{kernel.name} accepts {scheme.name} in {dtype}")
    some = list(takes.values())[:2]
    for static in _static(kernel, scheme):
        asked = [replace(r, weight=replace(r.weight, scheme=static)) for r in some]
        batches = (("", r, _static_jobs(r, subject.rows)) for r in asked)
        title = f"{kernel.name} runs {static.name} in {dtype}"
        _judge_all(subject, kernel_for(kernel, static), batches, title)


def _static_jobs(request: Request, rows: Sequence[int]) -> list[Job]:
    """As `plain_jobs`, of a scheme with a stored scale of activations."""
    spec, dtype = request.weight, request.dtype
    x = cases.activations(max(rows), spec.k, dtype)
    if INPUT_ZERO in spec.scheme.layout(spec.n, spec.k):
        x[1:2] = 1  # of zeros products cancel, but for a rounding where they are fused with sums
    stored, biases = weights.plain(spec), (None, cases.bias(spec.n, dtype))
    return [make_job(spec, stored, x[:count], bias, True) for bias in biases for count in rows]


def _static(kernel: Kernel, scheme: Scheme) -> Iterator[Scheme]:
    """The scheme with stored scales of activations, as far as it has those and the kernel takes them."""
    for option in ("static", "static_asym") if kernel.takes_codes else ():
        with suppress(ConfigError):
            static = scheme.option(option)
            if kernel.serves(static.per_token):
                yield static


def check_special(subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
    """Weights of zeros, outliers, one sign, or tiny and huge values come out as the reference says.

    Raises:
        AssertionError: it raised, or is wrong.
        NotHere: as for ``check_accepted``.
    """
    takes = _accepted(subject, kernel, scheme, dtype)
    # [48, 200] where it may
    spec, request = min(takes.items(), key=lambda item: abs(item[0].n * item[0].k - 9600))
    x, quantizes = cases.activations(5, spec.k, dtype), kernel.quantizes_activations
    jobs = {
        name: make_job(spec, weights.special(spec, name), x, None, quantizes)
        for name, _ in cases.specials(scheme)
    }
    batches = ((f"{name}: ", request, [job]) for name, job in jobs.items())
    _judge_all(subject, kernel, batches, f"{kernel.name} on special weights of {scheme.name} in {dtype}")


def check_packing(subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
    """``unpack`` is the exact inverse of ``pack``, for every weight that the kernel takes; neither changes
    its input.

    Raises:
        AssertionError: a bit differs.
        NotHere: as for ``check_accepted``.
    """
    takes = _accepted(subject, kernel, scheme, *cases.DTYPES)
    findings: list[str] = []
    compared = 0
    for spec, request in takes.items():
        where = subject.place(request.device)
        for name, _ in cases.specials(scheme):
            stored_weight = {key: t.to(where, copy=True) for key, t in weights.special(spec, name).items()}
            findings += [
                f"[{spec.n}, {spec.k}] {name}: {wrong}"
                for wrong in _round_trip(kernel, spec, stored_weight, request)
            ]
            compared += len(stored_weight)
    subject.conclude(f"packing of {scheme.name} by {kernel.name}", compared, list(dict.fromkeys(findings)))


def _round_trip(kernel: Kernel, spec: WeightSpec, stored_weight: StoredWeight, request: Request) -> list[str]:
    before = {name: cases.kept(t) for name, t in stored_weight.items()}
    try:
        packed: Packed = kernel.pack(stored_weight, spec)
        back = kernel.unpack(packed, spec)
        by_rows = packed_by_rows(kernel, stored_weight, spec)
    except Exception as error:
        if request.device.simulated:
            raise NotHere(
                f"{kernel.name} does not pack on the stand-in: {type(error).__name__}: {error}"
            ) from None
        return [f"raised {type(error).__name__}: {error}"]
    findings = (
        []
        if isinstance(packed, tuple)
        else [f"pack returned a {type(packed).__name__}, not a tuple of tensors"]
    )
    findings += [
        f"pack changed {name}" for name, t in stored_weight.items() if not cases.same_bits(t, before[name])
    ]
    if by_rows is not None and not all(map(cases.same_bits, by_rows, packed)):
        findings.append("what packed_layout joins of packed rows is not the packed weight")
    if set(back) != set(before):
        return [*findings, f"unpack returned {sorted(back)}, not {sorted(before)}"]
    return findings + [
        f"unpack gives another {name}" for name, t in before.items() if not cases.same_bits(t, back[name])
    ]


def packed_by_rows(kernel: Kernel, stored_weight: StoredWeight, spec: WeightSpec) -> Packed | None:
    """The weight packed in two ranges of rows; None where its kernel packs it as a whole, or it is no more
    than one range.
    """
    layout = kernel.packed_layout(spec)
    middle = 0 if layout is None else math.lcm(layout.block, alignment(spec.scheme, 0))
    if not 0 < middle < spec.n:
        return None
    ranges = ((0, middle), (middle, spec.n))
    return pack_steps(kernel, spec, [_rows(stored_weight, spec, *some) for some in ranges])


def _rows(stored_weight: StoredWeight, spec: WeightSpec, start: int, stop: int) -> QuantizedRows:
    rows = stored_slices(spec.scheme, spec.k, start, stop)
    some = {key: tensor[rows[key]] if rows[key] else tensor for key, tensor in stored_weight.items()}
    return QuantizedRows(start, stop, some)


def check_reference(subject: Subject, scheme: Scheme) -> None:
    """The reference quantizes to the same bits on the devices here as on the CPU, since weights are quantized
    there.

    Raises:
        AssertionError: a bit differs.
        NotHere: no device is here, or one only stores a dtype of the scheme: such weights are quantized
            on the host.
    """
    findings, compared = [], 0
    if not subject.here:
        raise NotHere(f"no device of kind {subject.kind} here")
    for device in subject.here:
        if any(dtype in device.arch.storage_only_dtypes for _, dtype in scheme.layout(48, 200).values()):
            raise NotHere(f"{device} only stores a dtype of {scheme.name}")
        for name, make in cases.specials(scheme):
            weight = make(48, 200)
            weight = weight.float() if weight.dtype in device.arch.storage_only_dtypes else weight
            try:
                there = numerics.quantize_weight(weight.to(device.torch_device), scheme)
            except WeightError as error:
                findings.append(f"{name} on {device}: {error}")
                continue
            here = numerics.quantize_weight(weight, scheme)
            compared += len(here)
            findings += [
                f"{name} on {device}: {key} differs"
                for key in here
                if not cases.same_bits(here[key], there[key])
            ]
    subject.conclude(f"reference of {scheme.name}", compared, findings)
