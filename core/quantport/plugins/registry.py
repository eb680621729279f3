"""Finds rooms and plugins once, through entry points; sets broken ones aside, by name and reason."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
import torch

from quantport.device import Device
from quantport.errors import BackendError, ConfigError, DeviceError, did_you_mean, one_of
from quantport.kernels import aten
from quantport.kernels.base import Kernel
from quantport.plugins import hookspecs
from quantport.plugins.hookspecs import Backend
from quantport.plugins.once import once, once_property
from quantport.scheme.catalog import BUILTIN, Schemes

GROUPS = ("quantport.backends", "quantport.plugins")


@dataclass(frozen=True)
class Problem:
    """A plugin that was set aside, or a detection that failed."""

    plugin: str
    stage: str
    error: str


class Registry:
    """The rooms and plugins of one process.

    Args:
        points: Entry points to load; the installed ones by default.
        only: Names to restrict the backends to; ``QUANTPORT_BACKENDS`` (comma-separated) by default.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None, only: Iterable[str] | None = None) -> None:
        self.problems: list[Problem] = []
        self.backends: dict[str, Backend] = {}
        self._names: dict[str, str] = {}
        self.schemes = BUILTIN
        self._manager = pluggy.PluginManager("quantport")
        self._manager.add_hookspecs(hookspecs)
        found = (
            [(p.group, p) for g in GROUPS for p in entry_points(group=g)]
            if points is None
            else [(p.group, p) for p in points]
        )
        allowed = _allowed(only, {p.name for g, p in found if g == GROUPS[0]})
        for group, point in sorted(found, key=lambda item: (item[0], item[1].name, item[1].value)):
            if group == GROUPS[1] or allowed is None or point.name in allowed:
                self._try(point.name, "import", self._load, point)

    def _try(self, plugin: str, stage: str, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # a stranger's code: set aside, named, never fatal
            self._set_aside(plugin, stage, f"{type(error).__name__}: {error}")
            return None

    def _set_aside(self, plugin: str, stage: str, error: str) -> None:
        self.problems.append(Problem(plugin, stage, error))
        warnings.warn(
            f"quantport set plugin {plugin!r} aside at {stage}: {error}", RuntimeWarning, stacklevel=3
        )

    def _load(self, point: EntryPoint) -> None:
        if self._manager.has_plugin(point.name):
            raise BackendError(
                f"load plugin {point.name!r} from {point.value}",
                f"a plugin of this name is loaded already: {self._manager.get_plugin(point.name)!r}",
                "rename one of the two entry points, or uninstall one package",
            )
        self._manager.register(point.load(), point.name)
        try:
            self._accept(point)
        except Exception:
            self._manager.unregister(name=point.name)
            raise

    def _accept(self, point: EntryPoint) -> None:
        backends = self._call("quantport_backend", point.name)
        schemes = [s for added in self._call("quantport_schemes", point.name) for s in added]
        merged = Schemes((*self.schemes.values(), *schemes))
        if point.group == GROUPS[0] and not backends:
            raise BackendError(
                f"load backend {point.name!r}", "no quantport_backend hook in it", "mark one with @hookimpl"
            )
        for backend in backends:
            self._check(point, backend)
            self.backends[backend.kind] = backend
            self._names[backend.kind] = point.name
        self.schemes = merged

    def _call(self, hook: str, plugin: str) -> list[Any]:
        caller = getattr(self._manager.hook, hook)
        return [impl.function() for impl in caller.get_hookimpls() if impl.plugin_name == plugin]

    def _check(self, point: EntryPoint, backend: object) -> None:
        if not isinstance(backend, Backend):
            raise BackendError(
                f"load backend {point.name!r}",
                f"its hook returned {backend!r}",
                "a quantport.backend.Backend",
            )
        lacking = [a for a in ("kind", "torch_type", "archs") if not hasattr(backend, a)]
        if lacking:
            raise BackendError(
                f"load backend {point.name!r}",
                f"it lacks {', '.join(lacking)}",
                "see quantport.plugins.hookspecs.Backend",
            )
        if backend.kind in self.backends:
            raise BackendError(
                f"load backend {point.name!r} for devices of kind {backend.kind!r}",
                f"{type(self.backends[backend.kind]).__module__} serves this kind already",
                "give the new backend a kind of its own, or restrict with QUANTPORT_BACKENDS",
            )

    @once_property
    def devices(self) -> tuple[Device, ...]:
        """Every device found, best rank first. A detection that raises is a problem, not an error."""
        ordered = sorted(self.backends.values(), key=lambda backend: -backend.rank)
        return tuple(
            d for backend in ordered for d in self._ask(backend, "detection", backend.detect, Device)
        )

    @once_property
    def _kernels(self) -> dict[str, tuple[Kernel, ...]]:
        out: dict[str, tuple[Kernel, ...]] = {}
        owners: dict[str, Kernel] = {}
        for kind, backend in self.backends.items():
            kernels = self._ask(backend, "kernels", backend.kernels, Kernel)
            for kernel in kernels:
                owner = owners.setdefault(kernel.name, kernel)
                shared = type(kernel) is type(owner) and type(kernel).__module__ == aten.__name__
                if owner is not kernel and not shared:
                    self._set_aside(
                        self._plugin(backend),
                        "kernels",
                        f"kernel name {kernel.name!r} is taken by {type(owner)!r}",
                    )
                    kernels = tuple(k for k in kernels if k is not kernel)
            out[kind] = kernels
        return out

    def _plugin(self, backend: Backend) -> str:
        return self._names[backend.kind]

    def _ask(self, backend: Backend, stage: str, call: Any, kind: type[Any]) -> tuple[Any, ...]:
        """Calls a backend's method and checks what it gives; anything wrong is a problem and an empty
        answer.
        """

        def checked() -> tuple[Any, ...]:
            found = tuple(call())
            for item in found:
                if not isinstance(item, kind):
                    raise BackendError(
                        f"{stage} of {backend.kind!r}", f"it gave {item!r}", f"a sequence of {kind.__name__}"
                    )
            return found

        return self._try(self._plugin(backend), stage, checked) or ()

    def kernels(self, kind: str) -> tuple[Kernel, ...]:
        """The kernels of one kind of device."""
        return self._kernels.get(kind, ())

    def kernel(self, name: str) -> Kernel:
        """One kernel by name.

        Raises:
            BackendError: no loaded backend has it.
        """
        table = {k.name: k for kernels in self._kernels.values() for k in kernels}
        if name not in table:
            raise BackendError(f"kernel {name!r}", "no loaded backend has it", one_of(name, table))
        return table[name]

    def device(self, asked: str | torch.device | Device = "auto") -> Device:
        """Resolves a device: ``auto``, ``kind``, ``kind:index``, ``kind:arch`` (simulated, for planning), or
        torch's.

        Raises:
            DeviceError: the kind or architecture is unknown, or no such device was found.
        """
        if isinstance(asked, Device):
            return asked
        if isinstance(asked, torch.device):
            return self._of_torch(asked)
        if not isinstance(asked, str):
            raise DeviceError(
                f"device {asked!r}", f"a {type(asked).__name__}", "a name such as 'auto', 'cpu' or 'cpu:0'"
            )
        text = os.environ.get("QUANTPORT_DEVICE", "auto") if asked == "auto" else asked
        if text == "auto":
            if not self.devices:
                raise DeviceError("device 'auto'", "no backend found a device", "run `quantport doctor`")
            return self.devices[0]
        kind, _, rest = text.partition(":")
        if kind not in self.backends:
            aside = [p for p in self.problems if p.plugin == kind]
            found = f"its backend was set aside: {aside[0].error}" if aside else "no backend has this kind"
            raise DeviceError(f"device {text!r}", found, one_of(kind, self.backends))
        if rest and not (rest.isascii() and rest.isdigit()):
            return self._simulated(text, kind, rest)
        here = [d for d in self.devices if d.kind == kind]
        matching = [d for d in here if not rest or d.index == int(rest)]
        if not matching:
            raise self._absent(text, kind, len(here))
        return matching[0]

    def _of_torch(self, asked: torch.device) -> Device:
        """The found device that holds the tensors of a torch device; two kinds may share one torch type."""
        for device in self.devices:
            if device.torch_type == asked.type and device.index == (asked.index or 0):
                return device
        raise self._absent(str(asked), asked.type, 0)

    def _absent(self, text: str, kind: str, count: int) -> DeviceError:
        failed = [
            p.error for p in self.problems if p.plugin == self._names.get(kind) and p.stage == "detection"
        ]
        found = f"detection failed: {failed[0]}" if failed else f"{count} such devices on this machine"
        archs = (
            [f"{kind}:{a}" for a in self.backends[kind].archs]
            if kind in self.backends
            else list(self.backends)
        )
        return DeviceError(
            f"device {text!r}", found, f"to plan for hardware that is not here: {', '.join(archs)}"
        )

    def _simulated(self, text: str, kind: str, arch: str) -> Device:
        backend = self.backends[kind]
        if arch not in backend.archs:
            raise DeviceError(
                f"device {text!r}",
                f"{kind} has no architecture {arch!r}",
                f"{did_you_mean(arch, backend.archs)}known: "
                f"{', '.join(f'{kind}:{a}' for a in backend.archs)}",
            )
        return Device(
            backend.archs[arch], name=backend.archs[arch].title, torch_type=backend.torch_type, simulated=True
        )


def _allowed(only: Iterable[str] | None, known: set[str]) -> set[str] | None:
    """The backends to load, or None for all of them."""
    asked = os.environ.get("QUANTPORT_BACKENDS", "").split(",") if only is None else list(only)
    names = {name.strip() for name in asked if name.strip()}
    for name in sorted(names - known):
        raise ConfigError(
            f"QUANTPORT_BACKENDS={','.join(sorted(names))}",
            f"no backend {name!r}",
            one_of(name, sorted(known)),
        )
    return names or None


@once
def default_registry() -> Registry:
    """The host of this process, made at first use."""
    return Registry()


def devices() -> tuple[Device, ...]:
    """Returns every device found, the one that ``device="auto"`` takes first."""
    return default_registry().devices
