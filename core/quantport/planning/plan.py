"""The plan: pure. Layers, configuration, device and kernels in; one Step for each layer out, with every
verdict.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import torch

from quantport.config import QuantConfig
from quantport.config.resolve import StoredSchemes, component_of, needs_default, resolve
from quantport.device import Device
from quantport.errors import ConfigError
from quantport.kernels.base import Kernel, WeightSpec
from quantport.kvcache import KVShape, kv_summary
from quantport.model.layers import FLOATS, Layer
from quantport.planning.memory import BUDGET, parse_budget, peak_with, resolve_budget
from quantport.planning.notices import notices
from quantport.planning.select_kernel import (
    best_scheme,
)
from quantport.planning.steps import Step, StepPlanner, step_dict
from quantport.scheme.catalog import Schemes

_WORTH_A_WARNING = 4 << 20  # bytes


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
        format_name: Name of the format of the checkpoint; empty for a module.
        shard: The rank whose share of each layer this is, and the number of ranks; None for a whole model.
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
    format_name: str = ""
    shard: tuple[int, int] | None = None

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

    @cached_property
    def components(self) -> dict[str, Plan]:
        """The plan of each component that the configuration names, with the layers in it; empty where it
        names none.
        """
        steps: dict[str, list[Step]] = {name: [] for name in self.config.components}
        for step in self.steps if steps else ():
            steps[component_of(step.layer, self.config)].append(step)
        return {
            name: replace(
                self,
                source=name,
                config=self._config_of(name),
                steps=tuple(steps[name]),
                kv_shape=None,
                warnings=(),
            )
            for name in steps
        }

    def _config_of(self, component: str) -> QuantConfig:
        inner = self.config.components[component]
        if inner is None:
            return QuantConfig()
        return inner if inner.scheme else inner.model_copy(update={"scheme": self.config.scheme})

    def __str__(self) -> str:
        rank = f", rank {self.shard[0]} of {self.shard[1]}" if self.shard else ""
        parts = [f"{self.source} on {self.device}{rank}"]
        parts += [f"  {name}\n{part._layers()}" for name, part in self.components.items()] or [self._layers()]
        return "\n".join([*parts, *(f"  warning: {text}" for text in self.warnings)])

    def _layers(self) -> str:
        """How many get which scheme, and the bytes before and after."""
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
        return "\n".join([*lines, total])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: stable keys, no objects."""
        return {
            "source": self.source,
            "format": self.format_name,
            "device": str(self.device),
            "shard": self.shard,
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
            "layers": [step_dict(s) for s in self.steps if s.layer.is_matrix],
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


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
    stored: StoredSchemes = MappingProxyType({}),
    format_name: str = "",
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
        stored: As for ``resolve``.
        format_name: Name of the format of the checkpoint.

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
    planner = StepPlanner(
        config, device, kernels, schemes, num_tokens, dtype, requested_budget or BUDGET, stored
    )
    steps = tuple(planner.step(assignment) for assignment in resolve(list(layers), config, default, stored))
    # refuses a layer that the model does not have
    kv_summary(kv, config.kv_cache_dtype, config.kv_cache_skip_layers)
    total = resolve_budget(requested_budget, _peaks(steps, schemes, kernels, stored))
    texts = (*warnings, *notices(step.layer for step in steps), *_mostly_kept(steps))
    return Plan(source, device, config, steps, num_tokens, why, kv, total, texts, format_name)


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


def _peaks(
    steps: Iterable[Step], schemes: Schemes, kernels: Sequence[Kernel], stored: StoredSchemes
) -> dict[str, int]:
    """Most bytes that are in flight while a weight of each layer is quantized; what is decoded is fp32."""
    by_name, peak = {kernel.name: kernel for kernel in kernels}, cache(peak_with)  # layers repeat

    return {
        step.layer.name: max(
            peak(
                None if step.layer.experts else by_name[step.choice.kernel],
                WeightSpec(schemes[step.scheme], n, k),
                torch.float32 if step.layer.home in stored else step.layer.dtype,
            )
            for _, n, k in step.layer.weights
        )
        for step in steps
        if step.choice
    }
