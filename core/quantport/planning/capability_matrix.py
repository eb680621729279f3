"""The capability matrix: scheme x architecture x layer kind, folded from the same verdicts as the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from quantport.device import Arch, Device
from quantport.errors import ConfigError, one_of
from quantport.kernels.base import Request, WeightSpec, unrelated_verdicts
from quantport.planning.select_kernel import Choice, choice_dict, select_kernel
from quantport.plugins.registry import Registry, default_registry

LAYERS = ("linear", "moe")
_SHAPE = (4096, 4096)


@dataclass(frozen=True)
class Cell:
    """What one scheme gets on one architecture for one kind of layer."""

    scheme: str
    arch: Arch
    layer: str
    requested_precision: str
    choice: Choice

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "scheme": self.scheme,
            "device": str(self.arch),
            "title": self.arch.title,
            "family": self.arch.family,
            "layer": self.layer,
            "asked": self.requested_precision,
            **choice_dict(self.choice),
        }


def matrix(
    scheme: str | None = None,
    device: str | None = None,
    layer: str | None = None,
    *,
    registry: Registry | None = None,
) -> tuple[Cell, ...]:
    """Answers what works where.

    Args:
        scheme: Only this scheme.
        device: Only this device: a kind, ``kind:arch``, or ``auto`` for the one found.
        layer: ``linear`` or ``moe``; both by default.
        registry: Where backends and schemes come from; by default that of the process.

    Returns:
        One cell for each scheme, architecture and layer kind, for a weight of 4096 x 4096 and one row.
    """
    registry = registry or default_registry()
    if layer is not None and layer not in LAYERS:
        raise ConfigError(f"layer={layer!r}", "no such kind of layer", one_of(layer, LAYERS))
    schemes = (
        [registry.schemes[scheme]]
        if scheme
        else [s for s in registry.schemes.values() if s.weight.format != "bf16"]
    )
    rows = [(s, kind) for s in schemes for kind in ([layer] if layer else LAYERS)]
    cells = []
    for kind, targets in groupby(_targets(registry, device), key=attrgetter("kind")):
        kernels = registry.kernels(kind)
        weights = [(WeightSpec(s, *_SHAPE), of, unrelated_verdicts(kernels, s, of)) for s, of in rows]
        for target in targets:
            for weight, of, unrelated in weights:
                request = Request(weight, of, target, target.arch.compute)
                choice = select_kernel(request, kernels, known=unrelated)
                cells.append(Cell(weight.scheme.name, target.arch, of, weight.scheme.precision, choice))
    return tuple(cells)


def _targets(registry: Registry, device: str | None) -> Sequence[Device]:
    if device in registry.backends:
        kinds = [str(device)]
    elif device:
        return [registry.device(device)]
    else:
        kinds = list(registry.backends)
    return [registry.device(f"{kind}:{arch}") for kind in kinds for arch in registry.backends[kind].archs]
