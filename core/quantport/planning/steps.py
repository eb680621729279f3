"""The steps of a plan: what happens to each layer, as was asked for and as the kernels of a device can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantport.config import QuantConfig
from quantport.config.resolve import Assignment, StoredSchemes
from quantport.device import Device
from quantport.errors import ConfigError, UnsupportedError
from quantport.kernels.base import Kernel, Request, WeightSpec
from quantport.kernels.verdict import Status
from quantport.model.fused_projections import split_projections
from quantport.model.layers import Layer
from quantport.model.roles import Role, SkipReason
from quantport.planning.memory import peak_with
from quantport.planning.select_kernel import (
    Choice,
    choice_dict,
    faster_text,
    select_embedding_kernel,
    select_kernel,
)
from quantport.scheme import Scheme
from quantport.scheme.catalog import Schemes


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
        stored: Whether the checkpoint stores it in this scheme already: its bits are taken over.
    """

    layer: Layer
    requested_scheme: str | None
    choice: Choice | None
    note: str
    before: int
    after: int
    skip_reason: SkipReason | None = None
    stored: bool = False

    @property
    def scheme(self) -> str:
        """Scheme of the module that runs it: ``bf16`` for a layer that stays, but prepacked."""
        return self.requested_scheme or "bf16"

    @property
    def slow(self) -> bool:
        """True when the chosen path is measured or known to be slower than BF16 for the expected tokens."""
        return bool(self.requested_scheme and self.choice and self.choice.slow)


def step_dict(step: Step) -> dict[str, Any]:
    """Plain data for JSON."""
    choice = step.choice
    out: dict[str, Any] = {
        "name": step.layer.name,
        "kind": step.layer.kind,
        "role": str(step.layer.role),
        "skip_reason": str(step.skip_reason.code) if step.skip_reason else None,
        "asked": step.requested_scheme,
        "stored": step.stored,
        "bytes_before": step.before,
        "bytes_after": step.after,
        "note": step.note,
    }
    if choice:
        out |= {k: v for k, v in choice_dict(choice).items() if k != "verdicts"}
    return out


def _bytes(layer: Layer, scheme: Scheme) -> int:
    """Bytes of the weights of a layer in a scheme."""
    return sum(scheme.bytes(n, k) for _, n, k in layer.each)


@dataclass
class StepPlanner:
    """Makes the steps. Choices are kept, since the layers of a model repeat."""

    config: QuantConfig
    device: Device
    kernels: Sequence[Kernel]
    schemes: Schemes
    num_tokens: int
    dtype: torch.dtype | None
    budget: int
    stored: StoredSchemes
    choices: dict[object, tuple[Choice, str]] = field(default_factory=dict)

    def step(self, assignment: Assignment) -> Step:
        """What happens to a layer.

        Raises:
            ConfigError: its scheme is for other layers.
            UnsupportedError: nothing runs its scheme.
        """
        if assignment.scheme is None:
            return self._skip(assignment.layer, assignment.skip_reason)
        if assignment.stored:
            return self._keep(assignment.layer, assignment.scheme)
        return self._quantize(assignment.layer, assignment.scheme)

    def _skip(self, layer: Layer, reason: SkipReason | None) -> Step:
        choice = self._dense_experts(layer) if layer.only else self._prepacked(layer)
        held, how = layer.held_dtype or layer.dtype, ""
        if layer.stored_bytes is not None and layer.loaded:
            how = f"stored as codes, decoded to {held}"
        elif choice is None and layer.loaded and held is not layer.dtype:
            how = f"stored as {layer.dtype}, held in {held}"
        note = "; ".join(filter(None, (str(reason or ""), how)))
        return Step(layer, None, choice, note, layer.bytes, layer.held_bytes, reason)

    def _quantize(self, layer: Layer, scheme_name: str) -> Step:
        if layer.kind == "other" or (layer.skip_reason and not layer.opt_in):
            raise ConfigError(
                f"scheme {scheme_name!r} for {layer.name}",
                str(layer.skip_reason),
                "name linear layers, experts, an lm_head or an embedding",
            )
        scheme, whole = self.schemes[scheme_name], layer
        if scheme.static:
            raise ConfigError(
                f"quantize {layer.name} to {scheme_name!r}",
                "no scale of activations: those are measured on data, by whoever makes a checkpoint",
                f"{scheme.per_token.name!r}, or a checkpoint that has them, without scheme=",
            )
        layer, parts_note = split_projections(layer, scheme)
        choice, kernel_note = self._runnable(layer, scheme)
        note = "; ".join(filter(None, (self._origin(whole), parts_note, kernel_note)))
        return Step(layer, scheme_name, choice, note, self._before(whole), _bytes(layer, scheme))

    def _keep(self, layer: Layer, scheme_name: str) -> Step:
        """A layer in the scheme that it is stored in."""
        scheme = self.schemes[scheme_name]
        choice, note = self._runnable(layer, scheme)
        size = _bytes(layer, scheme)
        return Step(layer, scheme_name, choice, note, size, size, stored=True)

    def _before(self, layer: Layer) -> int:
        """Bytes of the weights of a layer in the checkpoint."""
        schemes = self.stored.get(layer.home)
        if not schemes:
            return layer.bytes
        return sum(self.schemes[schemes[weight]].bytes(n, k) for weight, n, k in layer.each)

    def _origin(self, layer: Layer) -> str:
        """For people: what a layer that is quantized anew is stored as."""
        schemes = self.stored.get(layer.home, {})
        return f"from {', '.join(dict.fromkeys(schemes[w] for w, _, _ in layer.each))}" if schemes else ""

    def _runnable(self, layer: Layer, scheme: Scheme) -> tuple[Choice, str]:
        """As `_choose`.

        Raises:
            UnsupportedError: nothing runs it.
        """
        choice, note = self._choose(layer, scheme)
        if choice.status is Status.UNSUPPORTED:
            raise UnsupportedError(
                f"{scheme.name} for {layer.name} on {self.device} with fallback={self.config.fallback!r}",
                "; ".join(choice.reasons),
                "fallback='weight_only' or 'reference', a *_weight_only scheme, or another device "
                "(see `quantport matrix`)",
            )
        return choice, note

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
