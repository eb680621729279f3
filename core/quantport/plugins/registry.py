"""Finds plugins once, through entry points; sets broken ones aside, by name and reason."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from secrets import token_hex
from typing import Any

import pluggy
import torch

from quantport.checkpoint.format import CheckpointFormat
from quantport.checkpoint.plain_format import PlainFormat
from quantport.checkpoint.recognize import BUILTIN_FORMATS
from quantport.device import Device
from quantport.errors import BackendError, ConfigError, DeviceError, did_you_mean, one_of
from quantport.kernels.base import Kernel
from quantport.numerics.solvers import Solver
from quantport.plugins import hookspecs
from quantport.plugins.check_plugin import (
    added_kernels,
    called,
    check_backend,
    check_kernels,
    commands,
    named,
    register,
)
from quantport.plugins.entry_points import BACKENDS, PLUGINS, installed, is_builtin
from quantport.plugins.hookspecs import Backend
from quantport.plugins.once import once, once_property
from quantport.scheme import Scheme
from quantport.scheme.catalog import BUILTIN, Schemes


@dataclass(frozen=True)
class Problem:
    """A plugin that was set aside, or a detection that failed."""

    plugin: str
    stage: str
    error: str


class Registry:
    """What plugins bring: the backends, schemes, solvers, checkpoint formats and commands of one process.

    Args:
        points: Entry points to load; the installed ones by default.
        only: Names to restrict the backends to; ``QUANTPORT_BACKENDS`` (comma-separated) by default.

    Attributes:
        problems: Plugins that were set aside, and detections that failed.
        backends: Kind of device -> backend.
        schemes: Those of quantport and of plugins.
        solvers: Name -> solver of a plugin.
        formats: Name -> checkpoint format of a plugin.
        commands: Name -> command of a plugin.
        token: Tells this registry from others in handles of operators.
        is_default: Whether it is that of the process, which other processes have alike.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None, only: Iterable[str] | None = None) -> None:
        self.problems: list[Problem] = []
        self.backends: dict[str, Backend] = {}
        self.schemes = BUILTIN
        self.solvers: dict[str, Solver] = {}
        self.formats: dict[str, CheckpointFormat] = {}
        self.commands: dict[str, Callable[..., None]] = {}
        self.token, self.is_default = token_hex(4), False
        self._names: dict[str, str] = {}
        self._added: list[tuple[str, str, tuple[Kernel, ...]]] = []  # plugin, kind of device, kernels
        self._manager = pluggy.PluginManager("quantport")
        self._manager.add_hookspecs(hookspecs)
        plugins = installed() if points is None else list(points)
        self._allowed = allowed = _allowed(only, {p.name for p in plugins if p.group == BACKENDS})
        for point in sorted(plugins, key=lambda p: (not is_builtin(p), p.group, p.name, p.value)):
            if point.group == PLUGINS or allowed is None or point.name in allowed:
                self._try(point.name, "import", self._load, point)

    def __deepcopy__(self, memo: dict[int, Any]) -> Registry:
        """Itself: a copy of a module finds its kernels where the module does."""
        return self

    def __reduce__(self) -> tuple[Callable[[], Registry], tuple[()]]:
        """Pickles as the registry of the process that reads it: a pickled module names its kernels."""
        return default_registry, ()

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
        plugin = point.load()
        try:
            register(self._manager, plugin, point.name)
            self._accept(point)
        except Exception:  # whatever a stranger raises: nothing of it stays registered, and it is raised on
            if self._manager.has_plugin(point.name):
                self._manager.unregister(name=point.name)
            raise

    def _accept(self, point: EntryPoint) -> None:
        """Takes all that a plugin brings, or raises before any of it is taken."""
        name = point.name
        backends = called(self._manager, "quantport_backend", name)
        if self._allowed is not None and name not in self._allowed:
            backends = []  # a plugin that brings more than a backend, which is left out on purpose
        if point.group == BACKENDS and not backends:
            raise BackendError(
                f"load backend {name!r}", "no quantport_backend hook in it", "mark one with @hookimpl"
            )
        for backend in backends:
            check_backend(name, backend, self.backends)
        schemes = called(self._manager, "quantport_schemes", name)
        solvers = named(name, called(self._manager, "quantport_solvers", name), Solver, self.solvers)
        merged = Schemes(
            (*self.schemes.values(), *(s for some in schemes for s in some)),
            (*self.solvers.values(), *solvers.values()),
        )
        answers = called(self._manager, "quantport_checkpoint_formats", name)
        taken = {own.name: own for own in (*BUILTIN_FORMATS, PlainFormat())} | self.formats
        formats = named(name, answers, CheckpointFormat, taken)
        kernels = added_kernels(name, called(self._manager, "quantport_kernels", name))
        new = commands(name, called(self._manager, "quantport_commands", name), self.commands)
        self.schemes = merged
        self.solvers, self.formats = self.solvers | solvers, self.formats | formats
        self.commands = self.commands | new
        self._added += [(name, kind, added) for kind, added in kernels]
        for backend in backends:
            self.backends[backend.kind] = backend
            self._names[backend.kind] = name

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
            own = self._try(self._plugin(backend), "kernels", check_kernels, kind, kernels, owners)
            out[kind] = kernels if own is not None else ()
            owners |= own or {}
        for plugin, kind, kernels in self._added:
            if kind in self.backends or self._allowed is None:  # else the backend was left out on purpose
                own = self._try(plugin, "kernels", self._check_added, kind, kernels, owners)
                out[kind] = (*out.get(kind, ()), *(kernels if own is not None else ()))
                owners |= own or {}
        return out

    def _check_added(
        self, kind: str, kernels: tuple[Kernel, ...], owners: dict[str, Kernel]
    ) -> dict[str, Kernel]:
        if kind not in self.backends:
            known = one_of(kind, self.backends)
            raise BackendError(f"add kernels to devices of kind {kind!r}", "no backend has it", known)
        return check_kernels(kind, kernels, owners)

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
        table = self._by_name()
        if name not in table:
            raise BackendError(f"kernel {name!r}", "no loaded backend has it", one_of(name, table))
        return table[name]

    def identifies(self, kernel: Kernel, scheme: Scheme) -> bool:
        """Whether the names of a kernel and a scheme find the same ones here."""
        known = self._by_name().get(kernel.name)
        return (
            type(known) is type(kernel)
            and scheme.name in self.schemes
            and self.schemes[scheme.name] == scheme
        )

    def _by_name(self) -> dict[str, Kernel]:
        return {k.name: k for kernels in self._kernels.values() for k in kernels}

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

    def with_memory_now(self, device: Device) -> Device:
        """A found device with the memory that is free on it at this moment."""
        if device.simulated or device.kind not in self.backends:
            return device
        backend = self.backends[device.kind]
        answer = self._try(self._plugin(backend), "memory", lambda: (backend.memory(device),))
        return device if answer is None else replace(device, memory=answer[0])

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
    """The registry of this process, made at first use."""
    registry = Registry()
    registry.is_default = True
    return registry


def devices() -> tuple[Device, ...]:
    """Returns every device found, the one that ``device="auto"`` takes first."""
    return default_registry().devices
