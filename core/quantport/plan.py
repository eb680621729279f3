"""The plan: pure. Layers, configuration, device and kernels in; one Step for each layer out, with every verdict."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from quantport.capability import Accepted, Claim, Evidence, Rejected, Status, Verdict
from quantport.config import QuantConfig, compile_pattern
from quantport.device import Device
from quantport.errors import ConfigError, UnsupportedError
from quantport.kernel import Kernel, Request, WeightSpec
from quantport.layers import Layer
from quantport.scheme import Scheme, Schemes

BUDGET = 512 << 20  # bytes of scratch and source pages that loading may hold beside the quantized model
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
        speed: Relative to the best BF16 path at the expected rows; None when nobody measured it.
        slow: Why it is slower than BF16 (measured, or known without measuring); empty when it is not.
        deviation: Named difference from the scheme's numerics, or empty.
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
    deviation: str = ""
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class Step:
    """What happens to one layer.

    Attributes:
        layer: The layer.
        asked: Scheme asked for, or None for a layer that stays in 16 bits.
        choice: What it gets; None for a layer that stays as it is.
        note: Why it stays, or why it is slower than BF16 and what would be faster.
        before: Bytes of its weights in the checkpoint.
        after: Bytes once loaded.
    """

    layer: Layer
    asked: str | None
    choice: Choice | None
    note: str
    before: int
    after: int

    @property
    def scheme(self) -> str:
        """Scheme of the module that runs it: ``bf16`` for a layer that stays, but prepacked."""
        return self.asked or "bf16"

    @property
    def slow(self) -> bool:
        """True when the chosen path is measured or known to be slower than BF16 at the expected rows."""
        return bool(self.asked and self.choice and self.choice.slow)


@dataclass(frozen=True)
class Plan:
    """One Step for each layer of a model on one device. A value: print it, save it, compare it.

    Attributes:
        source: The model, as asked.
        device: The device, found or simulated.
        config: The configuration it follows.
        steps: One for each layer, in checkpoint order.
        rows: Expected rows of the activations.
        why: Why this scheme, when the device chose it.
    """

    source: str
    device: Device
    config: QuantConfig
    steps: tuple[Step, ...]
    rows: int = 1
    why: str = ""

    @property
    def before(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(s.before for s in self.steps)

    @property
    def after(self) -> int:
        """Bytes of all tensors once loaded."""
        return sum(s.after for s in self.steps)

    @property
    def peak(self) -> int:
        """Predicted peak bytes while loading: the loaded model and the budget for the stream."""
        return self.after + BUDGET

    @property
    def quantized(self) -> tuple[Step, ...]:
        """The steps that quantize."""
        return tuple(s for s in self.steps if s.asked)

    @cached_property
    def by_layer(self) -> dict[str, Step]:
        """Layer name -> step."""
        return {s.layer.name: s for s in self.steps}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: stable keys, no objects."""
        return {
            "source": self.source,
            "device": str(self.device),
            "rows": self.rows,
            "why": self.why,
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "bytes_before": self.before,
            "bytes_after": self.after,
            "bytes_peak": self.peak,
            "layers": [_step_dict(s) for s in self.steps if s.layer.kind != "other"],
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def _step_dict(step: Step) -> dict[str, Any]:
    choice = step.choice
    out: dict[str, Any] = {
        "name": step.layer.name,
        "kind": step.layer.kind,
        "asked": step.asked,
        "bytes_before": step.before,
        "bytes_after": step.after,
        "note": step.note,
    }
    if choice:
        out |= {k: v for k, v in choice_dict(choice).items() if k != "verdicts"}
    return out


def choice_dict(choice: Choice) -> dict[str, Any]:
    """Plain data of one choice, for JSON."""
    out = asdict(replace(choice, verdicts=()))
    out["evidence"] = str(choice.claim.evidence) if choice.claim else ""
    out["source"] = choice.claim.source if choice.claim else ""
    out["status"] = str(choice.status)
    out["verdicts"] = [{"kernel": v.kernel, "reasons": list(v.reasons) if isinstance(v, Rejected) else []} for v in choice.verdicts]
    del out["claim"]
    return out


def choose(request: Request | Sequence[Request], kernels: Sequence[Kernel], fallback: str = "weight_only") -> Choice:
    """Chooses the kernel for one request, or one kernel for all weights of a layer.

    The asked precision on native units comes first; then, by policy, the same weights with 16-bit activations, or the
    exact emulation. Among equals the fastest wins.

    Args:
        request: What the layer needs; several for the weights of one layer, which then share a scheme and a kernel.
        kernels: Every kernel of the device.
        fallback: ``weight_only``, ``reference`` or ``error``.

    Returns:
        The choice; its status is ``unsupported`` when the policy leaves nothing.
    """
    requests = [request] if isinstance(request, Request) else list(request)
    request = requests[0]
    verdicts = tuple(_worst([k.verdict(r) for r in requests]) for k in kernels)
    accepted = [v for v in verdicts if isinstance(v, Accepted)]
    scheme = request.weight.scheme
    asked = [v for v in accepted if v.precision == scheme.precision and v.status is not Status.REFERENCE]
    weight_only = [v for v in accepted if v.status is Status.WEIGHT_ONLY] if fallback == "weight_only" else []
    emulated = [v for v in accepted if v.status is Status.REFERENCE] if fallback != "error" else []
    pool = asked or weight_only or emulated
    reasons = _reasons(request, verdicts)
    if not pool:
        return Choice(Status.UNSUPPORTED, "", "", None, reasons, verdicts=verdicts)
    best = min(pool, key=lambda v: (_RANK[v.status], -(v.speed or 0)))
    reasons = () if best.status is Status.NATIVE else reasons
    slow = f"measured at {best.speed:.2f}x BF16 at {request.rows} rows" if best.speed is not None and best.speed < 1 else best.slow
    activations = (scheme if best.precision == scheme.precision else scheme.weight_only).activations
    return Choice(
        best.status, best.precision, best.kernel, best.claim, reasons, activations, best.speed, slow, best.deviation, verdicts
    )  # fmt: skip


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The refusal among a kernel's verdicts on the weights of one layer, else the first."""
    return next((v for v in verdicts if isinstance(v, Rejected)), verdicts[0])


def _reasons(request: Request, verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Why no native kernel of the asked precision ran, deduplicated; a missing kernel is told from missing hardware."""
    scheme, arch = request.weight.scheme, request.device.arch
    out: list[str] = []
    if scheme.activation:
        name = scheme.activation.format
        if name in arch.native:
            out.append(f"{arch.name} multiplies {name} natively, but this version has no kernel for {scheme.name} on it that fits")
        else:
            out.append(f"{arch.name} ({arch.title}) has no {name} matrix instruction [{arch.source}]")
    else:
        out.append(f"this version has no fused {scheme.precision} kernel for {arch.name}")
    for verdict in verdicts:
        if isinstance(verdict, Rejected) and not verdict.about_scheme:
            out += [f"{verdict.kernel}: {r}" for r in verdict.reasons if "no " + scheme.weight.format not in r]
    return tuple(dict.fromkeys(out))


def best_scheme(device: Device, kernels: Sequence[Kernel], schemes: Schemes, rows: int = 1) -> tuple[str, str]:
    """Picks the scheme for a device when nobody names one: near-lossless first, native, and not slower than BF16.

    Returns:
        ``(scheme name, why)``.
    """
    order = ("fp8_per_channel", "int8", "fp8_weight_only", "int8_weight_only")
    told: list[str] = []
    for name in order:
        choice = choose(Request(WeightSpec(schemes[name], 4096, 4096), "linear", device, device.arch.compute, rows), kernels)
        if choice.status is Status.NATIVE and not choice.slow:
            speed = "" if choice.speed is None else f", {choice.speed:.1f}x BF16"
            evidence = choice.claim.evidence if choice.claim else Evidence.DECLARED
            passed = f" (passed over: {'; '.join(told)})" if told else ""
            return name, f"{name}: {choice.precision} by {choice.kernel}{speed} [{evidence}]{passed}"
        told.append(f"{name} is {choice.status}" + (f", slower than BF16: {choice.slow}" if choice.slow else ""))
    return (
        "int8_weight_only",
        f"int8_weight_only: half the bytes and near-lossless; nothing here is faster than BF16 ({'; '.join(told)})",
    )


def make_plan(
    layers: Iterable[Layer],
    config: QuantConfig,
    device: Device,
    kernels: Sequence[Kernel],
    schemes: Schemes,
    *,
    source: str = "",
    rows: int = 1,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plans every layer. Pure: no host, no hardware, no weights.

    Args:
        layers: From ``find_layers``.
        config: Checked configuration.
        device: Found or simulated.
        kernels: The device's kernels.
        schemes: Known schemes.
        source: Name of the model, for people.
        rows: Expected rows of the activations.
        dtype: Activation dtype; by default that of the weights, or what the device computes in.

    Raises:
        ConfigError: patterns that match nothing or disagree.
        UnsupportedError: the fallback policy leaves a layer without a kernel.
    """
    layers = list(layers)
    _check_patterns(config, layers)
    parts = [c for c in config.components.values() if c] or [config]
    named = bool(config.scheme) or all(c.scheme or {"linear", "moe"} <= c.model_fields_set for c in parts)
    default, why = (None, "") if named else best_scheme(device, kernels, schemes, rows)
    planner = _Planner(config, device, kernels, schemes, rows, dtype)
    steps = tuple(planner.step(layer, *config.for_layer(layer, default)) for layer in layers)
    return Plan(source, device, config, steps, rows, why)


class _Planner:
    """Memoizes choices: the layers of a model repeat."""

    def __init__(
        self,
        config: QuantConfig,
        device: Device,
        kernels: Sequence[Kernel],
        schemes: Schemes,
        rows: int,
        dtype: torch.dtype | None,
    ) -> None:
        self.config, self.device, self.kernels, self.schemes, self.rows, self.dtype = (
            config,
            device,
            kernels,
            schemes,
            rows,
            dtype,
        )
        self.cache: dict[object, tuple[Choice, str]] = {}

    def step(self, layer: Layer, asked: str | None, why: str) -> Step:
        if asked is None:
            return Step(layer, None, self._kept(layer), why, layer.bytes, layer.bytes)
        if layer.kind == "other" or (layer.keep and "output head" not in layer.keep):
            raise ConfigError(f"scheme {asked!r} for {layer.name}", layer.keep, "name linear layers, experts or an untied lm_head")
        scheme = self.schemes[asked]
        key = (asked, layer.kind, layer.weights, layer.dtype)
        if key not in self.cache:
            self.cache[key] = self._choose(layer, scheme)
        choice, note = self.cache[key]
        if choice.status is Status.UNSUPPORTED:
            raise UnsupportedError(
                f"{asked} for {layer.name} on {self.device} with fallback={self.config.fallback!r}",
                "; ".join(choice.reasons),
                "fallback='weight_only' or 'reference', a *_weight_only scheme, or another device (see `quantport matrix`)",
            )
        after = sum(scheme.bytes(n, k) for _, n, k in layer.weights) * max(1, layer.experts)
        return Step(layer, asked, choice, note, layer.bytes, after)

    def _kept(self, layer: Layer) -> Choice | None:
        """The prepacked BF16 kernel for a linear layer that stays, where the device has one that was measured faster."""
        multiplied = layer.kind == "linear" and (not layer.keep or "output head" in layer.keep)
        if not multiplied or layer.dtype is not torch.bfloat16 or self.dtype not in (None, torch.bfloat16):
            return None
        choice = choose(self._request(layer, self.schemes["bf16"], *layer.weights[0][1:]), self.kernels)
        return choice if choice.speed is not None and choice.speed >= 1 else None

    def _choose(self, layer: Layer, scheme: Scheme) -> tuple[Choice, str]:
        requests = [self._request(layer, scheme, n, k) for _, n, k in layer.weights]
        choice = choose(requests, self.kernels, self.config.fallback)
        note = ""
        if choice.slow:
            note = f"slower than BF16: {choice.slow}"
            faster = self._faster(requests[0])
            note += f"; faster here: {faster}" if faster else "; no scheme is faster here"
        return choice, note

    def _faster(self, request: Request) -> str:
        """The fastest scheme that beats BF16 for this shape, with its speed."""
        best, name = 1.0, ""
        for scheme in self.schemes.values():
            weight = replace(request.weight, scheme=scheme)
            speed = choose(replace(request, weight=weight), self.kernels).speed
            if speed is not None and speed > best:
                best, name = speed, scheme.name
        return f"{name} ({best:.1f}x)" if name else ""

    def _request(self, layer: Layer, scheme: Scheme, n: int, k: int) -> Request:
        dtype = self.dtype or (self.device.arch.compute if layer.dtype is torch.bfloat16 else layer.dtype)
        return Request(WeightSpec(scheme, n, k), layer.kind, self.device, dtype, self.rows)


def _check_patterns(config: QuantConfig, layers: Sequence[Layer]) -> None:
    """Every pattern must match something: a silent no-op is the most reported failure of this field."""
    names = [layer.name for layer in layers] + list(dict.fromkeys(x.group for x in layers if x.group))
    for pattern in config.patterns():
        compiled = compile_pattern(pattern)
        if any(compiled.match(n) for n in names) or any(compiled.match(s) for x in layers for s in x.shards):
            continue
        inside = f"*{pattern}*"
        hint = f"did you mean {inside!r}? " if any(compile_pattern(inside).match(n) for n in names) else ""
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
        error = ConfigError(
            f"pattern {pattern!r}",
            f"it matches none of {len(names)} layers",
            f"{hint}close names: {', '.join(close) or 'none'}; on_unmatched='warn' to go on",
        )
        if config.on_unmatched == "error":
            raise error
        warnings.warn(str(error), UserWarning, stacklevel=3)
