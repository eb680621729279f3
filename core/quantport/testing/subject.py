"""What the checks look at: one backend, in a host, with the devices of this machine or simulated ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import cast

import torch

from quantport.capability import Accepted
from quantport.catalog import BUILTIN
from quantport.device import Device
from quantport.hookspecs import Backend, hookimpl
from quantport.host import GROUPS, Host, host
from quantport.kernel import Kernel, Request, WeightSpec
from quantport.scheme import Scheme
from quantport.testing import cases


@dataclass(frozen=True)
class _Point:
    """An entry point of the group of backends that was never installed."""

    name: str
    backend: Backend
    group: str = GROUPS[0]
    value: str = "alone"

    def load(self) -> ModuleType:
        """The plugin: a module with the one hook."""
        plugin = ModuleType(f"alone_{self.name}")
        vars(plugin)["quantport_backend"] = hookimpl(lambda: self.backend)
        return plugin


def alone(backend: Backend) -> Host:
    """A host that holds one backend, installed or not, and nothing that earlier questions have left."""
    return Host(points=(cast(EntryPoint, _Point(backend.kind, backend)),), only=())


@dataclass(frozen=True)
class Subject:
    """A backend under test.

    Attributes:
        hosted: The host that holds it.
        kind: Kind of its devices.
        policy: Phrase in a refusal -> why the kernel would run all the same: a refusal of policy, reviewed by people.
            Such a call is not tried, so that a kernel that reads past its operands belongs here too.
        stand_in: Where kernels run when no device of the kind is here; None for nowhere.
        schemes: The schemes to ask about.
    """

    hosted: Host
    kind: str
    policy: Mapping[str, str] = field(default_factory=dict)
    stand_in: str | None = "cpu"
    schemes: tuple[Scheme, ...] = tuple(BUILTIN.values())

    @classmethod
    def installed(cls, kind: str, policy: Mapping[str, str] | None = None, stand_in: str | None = "cpu") -> Subject:
        """The installed backend of a kind.

        Raises:
            AssertionError: no entry point of the group ``quantport.backends`` gave one.
        """
        found = host()
        if kind not in found.backends:
            problems = "; ".join(f"{p.plugin} at {p.stage}: {p.error}" for p in found.problems) or "none was set aside"
            raise AssertionError(f"no installed backend has kind {kind!r} (found: {', '.join(found.backends)}; {problems})")
        return cls(found, kind, policy or {}, stand_in, tuple(found.schemes.values()))

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Its kernels."""
        return self.hosted.kernels(self.kind)

    @property
    def here(self) -> tuple[Device, ...]:
        """One found device of each architecture."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a detection that raises is the business of check_detection
            found = [d for d in self.hosted.devices if d.kind == self.kind]
        return tuple({d.arch.name: d for d in reversed(found)}.values())

    @property
    def simulated(self) -> tuple[Device, ...]:
        """A simulated device of each known architecture."""
        return tuple(self.hosted.device(f"{self.kind}:{name}") for name in self.hosted.backends[self.kind].archs)

    @property
    def targets(self) -> tuple[Device, ...]:
        """What kernels are run for: the devices here, or the simulated ones."""
        return self.here or self.simulated

    def place(self, device: Device) -> torch.device | None:
        """Where to put tensors for a target."""
        if not device.simulated:
            return device.torch_device
        return torch.device(self.stand_in) if self.stand_in else None

    def requests(self, scheme: Scheme, dtype: torch.dtype, device: Device) -> Iterator[Request]:
        """Every request that the run checks make of a device, all rows of one shape and layer together."""
        for n, k in cases.SHAPES:
            for layer in cases.LAYERS:
                for rows in cases.EXPECTED:
                    yield Request(WeightSpec(scheme, n, k), layer, device, dtype, rows)

    def accepted(self, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> dict[WeightSpec, Request]:
        """Every weight that the kernel takes on a target, with one request that it accepts."""
        requests = [r for device in self.targets for r in self.requests(scheme, dtype, device)]
        return {r.weight: r for r in reversed(requests) if isinstance(kernel.verdict(r), Accepted)}
