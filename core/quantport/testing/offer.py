"""What there is to check of a backend: a fold over what its kernels accept and refuse, made before any test
runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from quantport.kernels import aten
from quantport.kernels.base import Kernel
from quantport.scheme import Scheme
from quantport.testing import builders, cases
from quantport.testing.check_refused import refused
from quantport.testing.subject import Subject

_SHARED = {type(kernel) for kernel in aten.portable()}
Row = TypeVar("Row", bound="tuple[Kernel, Scheme] | tuple[Kernel, Scheme, Any]")


@dataclass(frozen=True)
class Offer:
    """What the tests of a backend are about.

    Where no device is here, what needs one is a single row for each kernel: a skip that says so.

    Attributes:
        subject: The backend.
        schemes: Schemes of weights, for what is asked of no kernel.
        accepted: Kernel, scheme and dtype of the activations, where the kernel takes any weight of them.
        packed: Kernel and scheme of these.
        refused: Kernel and scheme, where something is impossible on a device that is here.
        layers: Kernel, scheme and layer of a module, where a device that is here takes it.
    """

    subject: Subject
    schemes: list[Scheme]
    accepted: list[tuple[Kernel, Scheme, torch.dtype]]
    packed: list[tuple[Kernel, Scheme]]
    refused: list[tuple[Kernel, Scheme]]
    layers: list[tuple[Kernel, Scheme, str]]

    @classmethod
    def of(
        cls,
        subject: Subject,
        every_kernel: bool = False,
        stands_for: Mapping[str, Collection[str]] | None = None,
    ) -> Offer:
        """Asks the kernels.

        Args:
            subject: The backend.
            every_kernel: Whether the shared kernels have all their schemes, where a device is here, and
                not one each.
            stands_for: Kernel -> its only schemes.
        """
        only, here = stands_for or {}, bool(subject.here)

        def some(rows: Iterable[Row], runs: bool) -> list[Row]:
            """One row of each shared kernel, unless all were asked for; one of every kernel, where
            none runs.
            """
            shown = list(rows)
            fewer = first(shown)
            return [
                row
                for row in shown
                if row in fewer or (runs and (all_of_them or type(row[0]) not in _SHARED))
            ]

        all_of_them = every_kernel and here
        served = [
            (k, s)
            for k in subject.kernels
            for s in subject.schemes
            if k.serves(s) and s.name in only.get(k.name, (s.name,))
        ]
        takes = [(k, s, d) for k, s in served for d in cases.DTYPES if subject.takes(k, s, d)]
        own = {s.name for k, s, _ in takes if type(k) not in _SHARED}
        schemes = [s for s in subject.schemes if all_of_them or (here and s.name in own)] or list(
            subject.schemes[:1]
        )
        packed = list(dict.fromkeys((k, s) for k, s, _ in takes))
        asked = [(k, s, layer) for k, s in packed for layer in cases.LAYERS]
        layers = [
            (k, s, layer)
            for k, s, layer in asked
            if any(builders.takes(k, s, layer, d) for d in subject.targets)
        ]
        runs = here or subject.stand_in is not None
        return cls(
            subject,
            schemes,
            some(takes, runs),
            some(packed, runs),
            [(k, s) for k, s in served if next(refused(subject, k, s), None)],
            some(layers, here),
        )


def first(rows: Iterable[Row]) -> list[Row]:
    """The first row of each kernel."""
    return list({row[0].name: row for row in reversed(list(rows))}.values())[::-1]
