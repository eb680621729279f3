"""The plan: pure. Layers, configuration, device and kernels in; one Step for each layer out, with every
verdict.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch

from quantport.config import QuantConfig
from quantport.config.resolve import Assignment, needs_default, resolve
from quantport.device import Device
from quantport.errors import ConfigError, UnsupportedError
from quantport.kernels.base import Kernel, Request, WeightSpec
from quantport.kernels.verdict import Status
from quantport.kvcache import KVShape, kv_summary
from quantport.model.fused_projections import split_projections
from quantport.model.layers import FLOATS, Layer
from quantport.model.roles import Role, SkipReason
from quantport.planning.memory import BUDGET, parse_budget, peak_with, resolve_budget
from quantport.planning.notices import notices
from quantport.planning.select_kernel import (
    Choice,
    best_scheme,
    choice_dict,
    faster_text,
    select_embedding_kernel,
    select_kernel,
)
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes

_WORTH_A_WARNING = 4 << 20  # bytes


@dataclass(frozen=True)
class Step:
    """What happens to one layer.

    Attributes:
        layer: The layer.
        requested_scheme: Name of the scheme that it shall have; None for a layer that stays in 16 bits.
        choice: What it gets; None for a layer that stays as it is.
        note: For people: why it stays, or why it is slower than BF16 and what would be faster.
        before: Bytes of its weights in the checkpoint.
        after: Bytes once loaded.
        skip_reason: Why it stays in 16 bits; None for one that is quantized.
    """

    layer: Layer
    requested_scheme: str | None
    choice: Choice | None
    note: str
    before: int
    after: int
    skip_reason: SkipReason | None = None

    @property
    def scheme(self) -> str:
        """Scheme of the module that runs it: ``bf16`` for a layer that stays, but prepacked."""
        return self.requested_scheme or "bf16"

    @property
    def slow(self) -> bool:
        """True when the chosen path is measured or known to be slower than BF16 for the expected tokens."""
        return bool(self.requested_scheme and self.choice and self.choice.slow)


@dataclass(frozen=True)
class Plan:
    """One Step for each layer of a model on one device. A value: print it, save it, compare it.

    Attributes:
        source: Name of the model, for people.
        device: The device, found or simulated.
        config: The configuration it follows.
        steps: One for each layer, in checkpoint order.
        num_tokens: Expected tokens at a time: rows of the activations.
        why: Why this scheme, when the device chose it.
        kv_shape: What the KV cache keeps for each token; None where that is not known.
        budget: Bytes that the stream may hold beside the loaded model.
        warnings: For people: tensors that are not loaded or are converted, ties that are none.
    """

    source: str
    device: Device
    config: QuantConfig
    steps: tuple[Step, ...]
    num_tokens: int = 1
    why: str = ""
    kv_shape: KVShape | None = None
    budget: int = BUDGET
    warnings: tuple[str, ...] = ()

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
        return self.after + self.budget

    @property
    def fits(self) -> bool | None:
        """Whether loading fits the memory that was free when it was planned; None where that is not known."""
        return None if self.device.memory is None else self.peak <= self.device.memory

    @property
    def quantized(self) -> tuple[Step, ...]:
        """The steps that quantize."""
        return tuple(s for s in self.steps if s.requested_scheme not in (None, "bf16"))

    @property
    def kv_cache(self) -> dict[str, Any]:
        """Dtype of the KV cache, the layers it skips, and its bytes per token beside those of BF16."""
        return kv_summary(self.kv_shape, self.config.kv_cache_dtype, self.config.kv_cache_skip_layers)

    @cached_property
    def by_layer(self) -> dict[str, Step]:
        """Layer name -> step."""
        return {s.layer.name: s for s in self.steps}

    def __str__(self) -> str:
        groups = Counter(
            (s.requested_scheme, s.choice.precision, str(s.choice.status), s.choice.kernel)
            for s in self.quantized
            if s.choice
        )
        lines = [
            f"  {n} layers: {a} -> {p} {status} by {kernel}" for (a, p, status, kernel), n in groups.items()
        ]
        kept = len(self.steps) - len(self.quantized)
        total = f"  {kept} stay as stored; {self.before / 1e6:.1f} MB -> {self.after / 1e6:.1f} MB"
        warned = [f"  warning: {text}" for text in self.warnings]
        return "\n".join([f"{self.source} on {self.device}", *lines, total, *warned])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: stable keys, no objects."""
        return {
            "source": self.source,
            "device": str(self.device),
            "rows": self.num_tokens,
            "why": self.why,
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "bytes_before": self.before,
            "bytes_after": self.after,
            "bytes_peak": self.peak,
            "bytes_free": self.device.memory,
            "fits": self.fits,
            "kv_cache": self.kv_cache,
            "warnings": list(self.warnings),
            "layers": [_step_dict(s) for s in self.steps if s.layer.is_matrix],
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def _step_dict(step: Step) -> dict[str, Any]:
    choice = step.choice
    out: dict[str, Any] = {
        "name": step.layer.name,
        "kind": step.layer.kind,
        "role": str(step.layer.role),
        "skip_reason": str(step.skip_reason.code) if step.skip_reason else None,
        "asked": step.requested_scheme,
        "bytes_before": step.before,
        "bytes_after": step.after,
        "note": step.note,
    }
    if choice:
        out |= {k: v for k, v in choice_dict(choice).items() if k != "verdicts"}
    return out


def make_plan(
    layers: Iterable[Layer],
    config: QuantConfig,
    device: Device,
    kernels: Sequence[Kernel],
    schemes: Schemes,
    *,
    source: str = "",
    num_tokens: int = 1,
    dtype: torch.dtype | None = None,
    kv: KVShape | None = None,
    budget: int | str | None = None,
    warnings: Iterable[str] = (),
) -> Plan:
    """Plans every layer. Pure: no registry, no hardware, no weights.

    Args:
        layers: From ``find_layers``.
        config: Checked configuration.
        device: Found or simulated.
        kernels: The device's kernels.
        schemes: Known schemes.
        source: Name of the model, for people.
        num_tokens: Expected tokens at a time: rows of the activations.
        dtype: Activation dtype; by default that of the weights, or what the device computes in.
        kv: What the model keeps for each token, where that is known.
        budget: Bytes (or ``"512MB"``) that the stream may hold beside the model; by default 512 MiB, or what
            the largest weight needs.
        warnings: What else is known of the checkpoint, for people.

    Raises:
        BudgetError: a single weight needs more than ``budget``.
        ConfigError: patterns that match nothing or disagree.
        UnsupportedError: the fallback policy leaves a layer without a kernel.
    """
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise ConfigError(
            f"num_tokens={num_tokens!r}",
            "not a number of tokens",
            "1 for decoding one sequence, more for batches and prompts",
        )
    if dtype is not None and dtype not in FLOATS:
        found = "not a floating dtype that models compute in"
        raise ConfigError(f"dtype={dtype!r}", found, "torch.bfloat16, torch.float16 or torch.float32")
    requested_budget = parse_budget(budget)
    default, why = best_scheme(device, kernels, schemes, num_tokens) if needs_default(config) else (None, "")
    planner = _Planner(config, device, kernels, schemes, num_tokens, dtype, requested_budget or BUDGET)
    steps = tuple(planner.step(assignment) for assignment in resolve(list(layers), config, default))
    # refuses a layer that the model does not have
    kv_summary(kv, config.kv_cache_dtype, config.kv_cache_skip_layers)
    total = resolve_budget(requested_budget, _peaks(steps, schemes, kernels))
    texts = (*warnings, *notices(step.layer for step in steps), *_mostly_kept(steps))
    return Plan(source, device, config, steps, num_tokens, why, kv, total, texts)


def _mostly_kept(steps: Iterable[Step]) -> Iterator[str]:
    """What one who expects a quantized model has to know: that less than half of its matrices became one, by
    bytes and without those that the configuration leaves alone. A few MB are not worth a word.
    """
    matrices = [
        step
        for step in steps
        if step.layer.is_matrix
        and step.layer.loaded
        and step.requested_scheme != "bf16"
        and not (step.skip_reason and step.skip_reason.configured)
    ]
    kept = [step for step in matrices if not step.requested_scheme]
    total, left = sum(step.before for step in matrices), sum(step.before for step in kept)
    if 2 * left > total and left > _WORTH_A_WARNING:
        largest = max(kept, key=lambda step: step.before)
        yield (
            f"only {1 - left / total:.0%} of the bytes of matrices are quantized; the largest that stays is "
            f"{largest.layer.name} ({largest.note})"
        )


def _peaks(steps: Iterable[Step], schemes: Schemes, kernels: Sequence[Kernel]) -> dict[str, int]:
    """Most bytes that are in flight while a weight of each layer is quantized."""
    by_name, peak = {kernel.name: kernel for kernel in kernels}, cache(peak_with)  # layers repeat

    return {
        step.layer.name: max(
            peak(
                None if step.layer.experts else by_name[step.choice.kernel],
                WeightSpec(schemes[step.scheme], n, k),
                step.layer.dtype,
            )
            for _, n, k in step.layer.weights
        )
        for step in steps
        if step.choice
    }


@dataclass
class _Planner:
    """Makes the steps. Choices are kept, since the layers of a model repeat."""

    config: QuantConfig
    device: Device
    kernels: Sequence[Kernel]
    schemes: Schemes
    num_tokens: int
    dtype: torch.dtype | None
    budget: int
    choices: dict[object, tuple[Choice, str]] = field(default_factory=dict)

    def step(self, assignment: Assignment) -> Step:
        if assignment.scheme is None:
            return self._skip(assignment.layer, assignment.skip_reason)
        return self._quantize(assignment.layer, assignment.scheme)

    def _skip(self, layer: Layer, reason: SkipReason | None) -> Step:
        choice = self._dense_experts(layer) if layer.only else self._prepacked(layer)
        note = str(reason or "")
        if choice is None and layer.loaded and layer.held_dtype not in (None, layer.dtype):
            note += f"; stored as {layer.dtype}, held in {layer.held_dtype}"
        after = layer.held_bytes if choice is None else layer.bytes
        return Step(layer, None, choice, note, layer.bytes, after, reason)

    def _quantize(self, layer: Layer, scheme_name: str) -> Step:
        if layer.kind == "other" or (layer.skip_reason and not layer.opt_in):
            raise ConfigError(
                f"scheme {scheme_name!r} for {layer.name}",
                str(layer.skip_reason),
                "name linear layers, experts, an lm_head or an embedding",
            )
        scheme = self.schemes[scheme_name]
        layer, parts_note = split_projections(layer, scheme)
        choice, kernel_note = self._choose(layer, scheme)
        if choice.status is Status.UNSUPPORTED:
            raise UnsupportedError(
                f"{scheme_name} for {layer.name} on {self.device} with fallback={self.config.fallback!r}",
                "; ".join(choice.reasons),
                "fallback='weight_only' or 'reference', a *_weight_only scheme, or another device "
                "(see `quantport matrix`)",
            )
        note = "; ".join(filter(None, (parts_note, kernel_note)))
        after = sum(scheme.bytes(n, k) for _, n, k in layer.each)
        return Step(layer, scheme_name, choice, note, layer.bytes, after)

    def _prepacked(self, layer: Layer) -> Choice | None:
        """The prepacked BF16 kernel for a linear layer that stays, where the device has one that was measured
        faster, and packing it fits the budget: it is packed as a whole.
        """
        skipped = layer.skip_reason is not None and not (layer.opt_in and layer.role is not Role.EMBEDDING)
        if layer.kind != "linear" or skipped:
            return None
        if layer.dtype is not torch.bfloat16 or self.dtype not in (None, torch.bfloat16):
            return None
        requests = self._requests(layer, self.schemes["bf16"])
        choice = select_kernel(requests, self.kernels)
        if choice.speed is None or choice.speed < 1:
            return None
        kernel = next(kernel for kernel in self.kernels if kernel.name == choice.kernel)
        peak = max(peak_with(kernel, request.weight, layer.dtype) for request in requests)
        return choice if peak <= self.budget else None

    def _dense_experts(self, layer: Layer) -> Choice:
        """The 16-bit kernel for experts or projections that stay, inside a layer whose other weights are
        quantized.

        Raises:
            ConfigError: they are not stored in BF16, the one dtype that is kept there.
            UnsupportedError: the device has no 16-bit kernel.
        """
        if layer.dtype is not torch.bfloat16:
            raise ConfigError(
                f"{layer.name} in 16 bits beside quantized experts",
                f"it is stored as {layer.dtype}",
                "a scheme for them, or null for the whole layer",
            )
        choice = select_kernel(self._requests(layer, self.schemes["bf16"]), self.kernels)
        if choice.status is Status.UNSUPPORTED:
            raise UnsupportedError(
                f"{layer.name} in 16 bits on {self.device}", "; ".join(choice.reasons), "a scheme for it"
            )
        return choice

    def _choose(self, layer: Layer, scheme: Scheme) -> tuple[Choice, str]:
        """The choice for a layer, and a note on it; chosen once for all layers that are alike."""
        is_table = layer.role is Role.EMBEDDING
        key = (scheme.name, layer.kind, layer.weights, layer.dtype, layer.name if is_table else "")
        if key not in self.choices:
            choose = self._choose_embedding if is_table else self._choose_multiplied
            self.choices[key] = choose(layer, self._requests(layer, scheme))
        return self.choices[key]

    def _choose_embedding(self, layer: Layer, requests: Sequence[Request]) -> tuple[Choice, str]:
        fallback = self.config.fallback
        return select_embedding_kernel(requests[0], self.kernels, fallback, layer.name, layer.tied)

    def _choose_multiplied(self, layer: Layer, requests: Sequence[Request]) -> tuple[Choice, str]:
        choice = select_kernel(requests, self.kernels, self.config.fallback)
        if not choice.slow:
            return choice, ""
        advice = faster_text(requests[0], self.kernels, self.schemes)
        return choice, f"slower than BF16: {choice.slow}; {advice}"

    def _requests(self, layer: Layer, scheme: Scheme) -> list[Request]:
        """What each weight of a layer needs of a kernel."""
        dtype = self.dtype or (self.device.arch.compute if layer.dtype is torch.bfloat16 else layer.dtype)
        return [
            Request(WeightSpec(scheme, n, k), layer.kind, self.device, dtype, self.num_tokens)
            for _, n, k in layer.weights
        ]
