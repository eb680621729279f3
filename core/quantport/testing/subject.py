"""What the checks look at: one backend, in a registry, with the devices of this machine or simulated ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from importlib.metadata import EntryPoint
from threading import Thread
from types import ModuleType
from typing import NamedTuple, cast

import torch

from quantport.device import Device
from quantport.kernels.base import Kernel, Request, WeightSpec
from quantport.kernels.verdict import Accepted
from quantport.plugins.entry_points import BACKENDS
from quantport.plugins.hookspecs import Backend, hookimpl
from quantport.plugins.registry import Registry, default_registry
from quantport.scheme import Scheme
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases


class NotHere(Exception):  # noqa: N818  # not an error: the suite skips
    """Nothing to check here: the kernel takes no such request, or its device is absent and the stand-in
    cannot run it.
    """


class Check(NamedTuple):
    """A check that found nothing wrong: its title, how many comparisons it made, and what else is worth
    telling.
    """

    title: str
    compared: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Point:
    """An entry point of the group of backends that was never installed."""

    name: str
    backend: Backend
    group: str = BACKENDS
    dist: None = None
    value: str = "alone"

    def load(self) -> ModuleType:
        """The plugin: a module with the one hook."""
        plugin = ModuleType(f"alone_{self.name}")
        vars(plugin)["quantport_backend"] = hookimpl(lambda: self.backend)
        return plugin


def alone(backend: Backend) -> Registry:
    """A registry that holds one backend, installed or not, and nothing that earlier questions have left."""
    return Registry(points=(cast(EntryPoint, _Point(backend.kind, backend)),), only=())


_STORED = {"int4_weight_only": ("fp32:asym", "channel:fp16"), "int8": ("asym",)}


def with_kernels_of_their_own(schemes: Iterable[Scheme]) -> tuple[Scheme, ...]:
    """These schemes, and those of their options that change what is multiplied, and so the kernel; and
    numbers that checkpoints of others have.
    """
    return tuple(
        some
        for scheme in schemes
        for some in (
            scheme,
            *(scheme.option(o) for o in scheme.options if o == "a8"),
            *(reduce(Scheme.option, names.split(":"), scheme) for names in _STORED.get(scheme.name, ())),
        )
    )


@dataclass(frozen=True)
class Subject:
    """A backend under test.

    Attributes:
        registry: What holds it.
        kind: Kind of its devices.
        stand_in: Where kernels run when no device of the kind is here; None for nowhere.
        schemes: The schemes to ask about.
        rows: Numbers of rows of activations that kernels are run with.
        limit: Seconds that detection, or one refused call, may take.
        record: The checks that found nothing wrong.
    """

    registry: Registry
    kind: str
    stand_in: str | None = "cpu"
    schemes: tuple[Scheme, ...] = with_kernels_of_their_own(BUILTIN.values())
    rows: tuple[int, ...] = cases.ROWS
    limit: float = 60.0
    record: list[Check] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def installed(cls, kind: str, stand_in: str | None = "cpu", limit: float = 60.0) -> Subject:
        """The installed backend of a kind.

        Raises:
            AssertionError: no entry point of the group ``quantport.backends`` gave one.
        """
        found = default_registry()
        if kind not in found.backends:
            problems = (
                "; ".join(f"{p.plugin} at {p.stage}: {p.error}" for p in found.problems)
                or "none was set aside"
            )
            raise AssertionError(
                f"no installed backend has kind {kind!r} (found: {', '.join(found.backends)}; {problems})"
            )
        return cls(found, kind, stand_in, with_kernels_of_their_own(found.schemes.values()), limit=limit)

    def conclude(self, title: str, compared: int, findings: Sequence[str], notes: Sequence[str] = ()) -> None:
        """The end of every check: what was found, or what was compared.

        Raises:
            AssertionError: with the title, the first ten findings and how many there are; or nothing was
                compared.
        """
        if findings:
            lines = "\n".join(f"- {finding}" for finding in findings[:10])
            raise AssertionError(f"{title}: {len(findings)} finding(s)\n{lines}")
        if compared < 1:
            raise AssertionError(f"{title}: nothing was compared")
        self.record.append(Check(title, compared, tuple(notes)))

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Its kernels."""
        return self.registry.kernels(self.kind)

    @cached_property
    def here(self) -> tuple[Device, ...]:
        """One found device of each architecture.

        Raises:
            AssertionError: detection takes longer than the limit.
        """
        found: list[Device] = []

        def look() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a detection that raises is the business of check_detection
                found.extend(d for d in self.registry.devices if d.kind == self.kind)

        # so that one that hangs stops neither the tests nor the end of Python
        looking = Thread(target=look, daemon=True)
        looking.start()
        looking.join(self.limit)
        if looking.is_alive():
            raise AssertionError(f"detection of {self.kind} hangs: it takes longer than {self.limit:g} s")
        return tuple({d.arch.name: d for d in reversed(found)}.values())

    @property
    def simulated(self) -> tuple[Device, ...]:
        """A simulated device of each known architecture."""
        return tuple(
            self.registry.device(f"{self.kind}:{name}") for name in self.registry.backends[self.kind].archs
        )

    @property
    def targets(self) -> tuple[Device, ...]:
        """What kernels are run for: the devices here, or the simulated ones."""
        return self.here or self.simulated

    def place(self, device: Device) -> torch.device:
        """Where to put tensors for a target.

        Raises:
            NotHere: the device is simulated, and there is no stand-in.
        """
        if not device.simulated:
            return device.torch_device
        if not self.stand_in:
            raise NotHere(f"no device of kind {self.kind} here, and no stand-in")
        return torch.device(self.stand_in)

    def requests(
        self,
        scheme: Scheme,
        dtype: torch.dtype,
        device: Device,
        shapes: Sequence[tuple[int, int]] = cases.SHAPES,
    ) -> Iterator[Request]:
        """Every request that the run checks make of a device, all rows of one shape and layer together."""
        for n, k in shapes:
            for layer in cases.LAYERS:
                for rows in cases.EXPECTED:
                    yield Request(WeightSpec(scheme, n, k), layer, device, dtype, rows)

    def accepted(self, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> dict[WeightSpec, Request]:
        """Every weight that the kernel takes on a target, with one request that it accepts."""
        requests = [r for device in self.targets for r in self.requests(scheme, dtype, device)]
        return {r.weight: r for r in reversed(requests) if isinstance(kernel.verdict(r), Accepted)}

    def takes(self, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> bool:
        """Whether there is any such weight."""
        requests = (r for device in self.targets for r in self.requests(scheme, dtype, device))
        return any(isinstance(kernel.verdict(r), Accepted) for r in requests)
