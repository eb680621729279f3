"""The check of refusals: what cannot work is called all the same, in a process of its own, and must
not work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from quantport.device import Device
from quantport.kernels.base import Kernel, Request, WeightSpec
from quantport.kernels.verdict import Reason, Refusal, Rejected
from quantport.plugins.registry import default_registry
from quantport.scheme import Scheme
from quantport.testing import cases
from quantport.testing.apart import Apart, Ended
from quantport.testing.check_runs import compare, plain_jobs
from quantport.testing.subject import NotHere, Subject

_SHAPES = tuple(dict.fromkeys((*cases.SHAPES, *cases.beyond())))
ENDS = 2  # calls with the same reasons that may end the process before the others count as tried


def refused(subject: Subject, kernel: Kernel, scheme: Scheme) -> Iterator[tuple[Request, tuple[Reason, ...]]]:
    """What the kernel says is impossible on a device that is here, whatever the rows; of each weight once.

    Shapes are those of the table, and others beyond it unless the reasons are the same for every shape. A
    refusal of another kind may succeed, or must not be tried.
    """
    for device in subject.here:
        for dtype in cases.DTYPES:
            found: dict[tuple[WeightSpec, tuple[Reason, ...]], Request] = {}
            for request, reasons in _impossible(subject, kernel, scheme, dtype, device):
                found.setdefault((request.weight, reasons), request)
            told = {reasons for _, reasons in found}
            for (weight, reasons), request in found.items():
                if len(told) > 1 or len(found) < len(_SHAPES) or (weight.n, weight.k) in cases.SHAPES:
                    yield request, reasons


def _impossible(
    subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype, device: Device
) -> Iterator[tuple[Request, tuple[Reason, ...]]]:
    asked: dict[tuple[WeightSpec, str], list[Request]] = {}
    for request in subject.requests(scheme, dtype, device, _SHAPES):
        if request.layer in kernel.layers:
            asked.setdefault((request.weight, request.layer), []).append(request)
    for requests in asked.values():
        verdicts = [kernel.verdict(r) for r in requests]
        reasons = tuple(dict.fromkeys(r for v in verdicts if isinstance(v, Rejected) for r in v.reasons))
        if all(isinstance(v, Rejected) for v in verdicts) and all(
            r.kind is Refusal.IMPOSSIBLE for r in reasons
        ):
            yield requests[0], reasons


def tried(kernel: Kernel | str, request: Request, rows: tuple[int, ...]) -> str:
    """Calls a kernel, or the installed one of a name, for a device that is here.

    Returns:
        How it failed, or an empty string: it ran, and is right for every number of rows.
    """
    found = default_registry().kernel(kernel) if isinstance(kernel, str) else kernel
    try:
        return compare(
            found, plain_jobs(request, found.quantizes_activations, rows), request.device.torch_device
        )
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"


def check_refused(subject: Subject, kernel: Kernel, scheme: Scheme, apart: Apart) -> None:
    """What the kernel says is impossible on a device that is here does not work: it raises, is wrong, crashes
    or hangs.

    Args:
        subject: The backend.
        kernel: One of its kernels.
        scheme: A scheme that it serves.
        apart: Where it is called.

    Raises:
        AssertionError: a refused call succeeds for every number of rows.
        NotHere: no refusal can be tried.
    """
    sent = kernel.name if subject.registry is default_registry() else kernel
    findings: list[str] = []
    notes: dict[str, None] = {}
    ends: Counter[tuple[Reason, ...]] = Counter()
    compared = 0
    for request, reasons in refused(subject, kernel, scheme):
        if ends[reasons] >= ENDS:
            continue
        shape = f"[{request.weight.n}, {request.weight.k}] {request.dtype}"
        compared += 1
        try:
            failed = apart.call(tried, sent, request, subject.rows)
        except Ended as end:
            ends[reasons] += 1
            notes[f"{shape}: the process {end}"] = None
            continue
        if not failed:
            findings.append(
                f"{shape} for {request.layer} runs and is right, against {[str(r) for r in reasons]}"
            )
    if not compared:
        raise NotHere(f"{kernel.name} says of no {scheme.name} that it is impossible here")
    title = (
        f"{kernel.name} refuses {scheme.name} as impossible, yet it works (if that is meant, give the "
        "reason another kind)"
    )
    subject.conclude(title, compared, findings, list(notes))
