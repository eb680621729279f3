"""Chooses a kernel: a pure fold over the kernels' verdicts. The plan, the matrix and the modules all choose
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from quantport.device import Device
from quantport.errors import ConfigError
from quantport.kernels.base import Kernel, Request, WeightSpec, guarded_verdict
from quantport.kernels.embedding import embedding_kernels, why_not_rows
from quantport.kernels.verdict import Accepted, Claim, Evidence, ReasonCode, Rejected, Status, Verdict
from quantport.scheme.catalog import Schemes
from quantport.scheme.quality import Quality, QualityClass, measured_quality

_RANK = {Status.NATIVE: 0, Status.WEIGHT_ONLY: 1, Status.DEQUANTIZE: 2, Status.REFERENCE: 3}


@dataclass(frozen=True)
class Choice:
    """What a request gets on a device.

    Attributes:
        status: The outcome.
        precision: Effective precision, empty when unsupported.
        kernel: Chosen kernel, empty when unsupported.
        claim: Evidence and its source.
        reasons: Why it is not what was asked, or why not a better kernel; empty when native.
        activations: How activations are quantized in effect, for example ``e4m3fn per token``.
        speed: Relative to the best BF16 path for the expected tokens; None when nobody measured it.
        slow: Why it is slower than BF16 (measured, or known without measuring); empty when it is not.
        numeric_deviation: Named difference from the scheme's numerics, or empty.
        quality: What the numbers that it computes cost on a real model; None where nobody measured it.
        verdicts: Every kernel's verdict, for whoever wants to know why.
    """

    status: Status
    precision: str
    kernel: str
    claim: Claim | None
    reasons: tuple[str, ...]
    activations: str = "16-bit"
    speed: float | None = None
    slow: str = ""
    numeric_deviation: str = ""
    quality: Quality | None = None
    verdicts: tuple[Verdict, ...] = ()


def choice_dict(choice: Choice) -> dict[str, Any]:
    """Plain data of one choice, for JSON."""
    out = asdict(replace(choice, verdicts=()))
    out["evidence"] = str(choice.claim.evidence) if choice.claim else ""
    out["source"] = choice.claim.source if choice.claim else ""
    out["status"] = str(choice.status)
    out["verdicts"] = [
        {"kernel": v.kernel, "reasons": [str(r) for r in v.reasons] if isinstance(v, Rejected) else []}
        for v in choice.verdicts
    ]
    out["deviation"] = out.pop("numeric_deviation")
    out["quality"] = choice.quality.to_dict() if choice.quality else None
    del out["claim"]
    return out


def select_kernel(
    request: Request | Sequence[Request],
    kernels: Sequence[Kernel],
    fallback: str = "weight_only",
    known: Mapping[str, Rejected] = MappingProxyType({}),
) -> Choice:
    """Chooses the kernel for one request, or one kernel for all weights of a layer.

    The requested precision on native units comes first; then, by policy, the same weights with 16-bit
    activations, or the exact emulation. Among equals the fastest wins.

    Args:
        request: What the layer needs; several for the weights of one layer, which then share a scheme and
            a kernel.
        kernels: Every kernel of the device.
        fallback: ``weight_only``, ``reference`` or ``error``.
        known: Refusals of kernels that need not be asked again, by name: ``unrelated_verdicts``.

    Returns:
        The choice; its status is ``unsupported`` when the policy leaves nothing.
    """
    requests = [request] if isinstance(request, Request) else list(request)
    request = requests[0]
    verdicts = tuple([known.get(kernel.name) or _verdict(kernel, requests) for kernel in kernels])
    accepted = [v for v in verdicts if isinstance(v, Accepted)]
    scheme = request.weight.scheme
    exact = [v for v in accepted if v.precision == scheme.precision and v.status is not Status.REFERENCE]
    weight_only = [v for v in accepted if v.status is Status.WEIGHT_ONLY] if fallback == "weight_only" else []
    emulated = [v for v in accepted if v.status is Status.REFERENCE] if fallback != "error" else []
    pool = exact or weight_only or emulated
    if not pool:
        reasons = _reasons(request, verdicts)
        return Choice(Status.UNSUPPORTED, "", "", None, reasons, verdicts=verdicts)
    best = min(pool, key=lambda v: (_RANK[v.status], -(v.speed or 0)))
    reasons = () if best.status is Status.NATIVE else _reasons(request, verdicts)
    if scheme.static and best.status is Status.WEIGHT_ONLY:
        reasons += ("the stored scale of activations is kept and not used: they stay in 16 bits",)
    slow = (
        f"measured at {best.speed:.2f}x BF16 at {request.num_tokens} rows"
        if best.speed is not None and best.speed < 1
        else best.slow
    )
    effective = scheme if best.precision == scheme.precision else scheme.weight_only
    return Choice(
        best.status,
        best.precision,
        best.kernel,
        best.claim,
        reasons,
        effective.activations,
        best.speed,
        slow,
        best.numeric_deviation,
        measured_quality(effective),
        verdicts,
    )


def _verdict(kernel: Kernel, requests: Sequence[Request]) -> Verdict:
    """The first refusal of the weights of one layer, else the verdict on its first weight."""
    first = guarded_verdict(kernel, requests[0])
    if len(requests) == 1 or isinstance(first, Rejected):
        return first
    others = (guarded_verdict(kernel, request) for request in requests[1:])
    return next((verdict for verdict in others if isinstance(verdict, Rejected)), first)


def _reasons(request: Request, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Why no native kernel of the requested precision runs, each reason once; a missing kernel is told from
    missing hardware.
    """
    scheme, arch = request.weight.scheme, request.device.arch
    unit = scheme.activation.unit if scheme.activation else None
    no_unit = unit is not None and unit not in arch.native
    if unit is None:
        summary = f"this version has no fused {scheme.precision} kernel for {arch.name}"
    elif no_unit:
        summary = f"{arch.name} ({arch.title}) has no {unit} matrix instruction [{arch.source}]"
    else:
        summary = (
            f"{arch.name} multiplies {unit} natively, but this version has no kernel for {scheme.name} on it "
            "that fits"
        )
    of_kernels = [
        f"{verdict.kernel}: {reason}"
        for verdict in verdicts
        if isinstance(verdict, Rejected) and not verdict.unrelated
        for reason in verdict.reasons
        if not (no_unit and reason.code is ReasonCode.NO_MATRIX_INSTRUCTION)  # the summary says it
    ]
    return tuple(dict.fromkeys([summary, *of_kernels]))


# Of those whose scales are per row, which take weights of any shape; the first of equals wins.
_CANDIDATES = ("fp8_per_channel", "int8", "int8_weight_only", "fp8_weight_only")
_LAST_RESORT = "int8_weight_only"


def best_scheme(
    device: Device, kernels: Sequence[Kernel], schemes: Schemes, num_tokens: int = 1
) -> tuple[str, str]:
    """Picks the scheme for a device when nobody names one: the fastest of those that are near-lossless on a
    real model and run as asked; where nobody measured their speed, the native one with the fewest bytes.

    Returns:
        ``(scheme name, why)``: its speed, its memory and its quality.
    """
    choices = {
        name: select_kernel(
            Request(WeightSpec(schemes[name], 4096, 4096), "linear", device, device.arch.compute, num_tokens),
            kernels,
        )
        for name in _CANDIDATES
    }
    pool = {
        name: choice
        for name, choice in choices.items()
        if choice.precision == schemes[name].precision
        and (quality := measured_quality(schemes[name]))
        and quality.quality_class is QualityClass.NEAR_LOSSLESS
    } or {_LAST_RESORT: choices[_LAST_RESORT]}

    def rank(name: str) -> tuple[float, ...]:
        choice = pool[name]
        order = (bool(choice.slow), _RANK.get(choice.status, len(_RANK)), choice.speed is None)
        return (*order, -(choice.speed or 0), schemes[name].bytes(4096, 4096))

    name = min(pool, key=rank)
    best = pool[name]
    measured = sum(choice.speed is not None for choice in pool.values())
    if best.speed is not None:
        why = f"the fastest of {measured} near-lossless schemes measured here"
    else:
        speeds = "those measured are slower than BF16" if measured else "nobody measured their speed"
        why = f"the fewest bytes of the near-lossless schemes that are {best.status} here; {speeds}"
    memory = schemes[name].bytes(4096, 4096) / (2 * 4096 * 4096)
    return name, (
        f"{name}: {best.precision} by {best.kernel}; speed: {speed_text(best, num_tokens)}; "
        f"memory: {memory:.0%} of 16 bits; quality: {measured_quality(schemes[name]) or 'not known'}; {why}"
    )


def speed_text(choice: Choice, num_tokens: int) -> str:
    """What is known of the speed of a choice, for people; nothing is ``unknown``."""
    if choice.speed is not None:
        evidence = choice.claim.evidence if choice.claim else Evidence.DECLARED
        return f"{choice.speed:.2f}x BF16 at {num_tokens} {'row' if num_tokens == 1 else 'rows'} [{evidence}]"
    return f"slower than BF16: {choice.slow}" if choice.slow else "unknown, nobody measured it here"


def faster_text(request: Request, kernels: Sequence[Kernel], schemes: Schemes) -> str:
    """The scheme that was measured fastest for a shape where it beats BF16; else what is not known, for
    people.
    """
    choices = {
        name: select_kernel(replace(request, weight=replace(request.weight, scheme=scheme)), kernels)
        for name, scheme in schemes.items()
    }
    name = max(choices, key=lambda name: choices[name].speed or 0)
    if (speed := choices[name].speed or 0) > 1:
        return f"faster here: {name} ({speed:.1f}x)"
    unknown = [name for name, choice in choices.items() if choice.speed is None and not choice.slow]
    if not unknown:
        return "no scheme is faster here"
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return f"nobody measured the speed of {', '.join(unknown[:3])}{more} here"


def select_embedding_kernel(
    request: Request, kernels: Sequence[Kernel], fallback: str, name: str, tied: Sequence[str]
) -> tuple[Choice, str]:
    """Chooses the kernel of an embedding, which is also that of the output heads that share its weight.

    Returns:
        ``(choice, note)``.

    Raises:
        ConfigError: rows of this scheme cannot be looked up.
    """
    scheme = request.weight.scheme
    if why := why_not_rows(scheme, request.weight.k):
        suggestion = (
            "a scheme with scales per row or per group of a row, such as int8_weight_only; or null, to "
            "leave it in 16 bits"
        )
        raise ConfigError(f"scheme {scheme.name!r} for the embedding {name}", why, suggestion)
    usable = embedding_kernels(kernels, bool(tied))
    if not tied:
        choice = select_kernel(request, usable)
        if not choice.kernel:
            return choice, ""
        reasons = ("rows are looked up and dequantized; nothing is multiplied",)
        return replace(choice, reasons=reasons, slow="", status=Status.DEQUANTIZE), ""
    choice, best = select_kernel(request, usable, fallback), select_kernel(request, kernels, fallback)
    note = f"one weight with {', '.join(tied)}"
    if best.kernel != choice.kernel:
        note += (
            f"; {best.kernel} packs it so that rows cannot be looked up: multiplied by "
            f"{choice.kernel or 'no other kernel'}"
        )
    return choice, note
