"""Finds plugins once, through entry points; sets broken ones aside, by name and reason."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import EntryPoint
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy
import torch

from quantport.device import Device
from quantport.errors import BackendError, ConfigError, DeviceError, one_of
from quantport.kernels.base import Kernel
from quantport.kvcache.kernel import KVKernel
from quantport.numerics.solvers import Solver
from quantport.plugins import hookspecs
from quantport.plugins.check_plugin import (
    FORMATS_HOOK,
    added_kernels,
    called,
    check_backend,
    check_kernels,
    commands,
    formats_by_name,
    kv_kernel_of,
    members,
    memory_of,
    named,
    register,
)
from quantport.plugins.device_names import DeviceNames
from quantport.plugins.entry_points import BACKENDS, PLUGINS, installed, is_builtin
from quantport.plugins.guard import answer, answers, time_limit
from quantport.plugins.hookspecs import Backend
from quantport.plugins.once import once, once_property
from quantport.scheme import Scheme
from quantport.scheme.catalog import BUILTIN, Schemes

if TYPE_CHECKING:  # takes as long to import as all that the matrix needs of core
    from quantport.checkpoint.format import CheckpointFormat


@dataclass(frozen=True)
class Problem:
    """A plugin that was set aside, or a detection that failed."""

    plugin: str
    stage: str
    error: str


class _Brought(NamedTuple):
    """All that one plugin brings."""

    plugin: object
    backends: list[Backend]
    schemes: Schemes  # those of before too
    solvers: dict[str, Solver]
    formats: dict[str, CheckpointFormat]
    kernels: list[tuple[str, tuple[Kernel, ...]]]
    commands: dict[str, Callable[..., None]]


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
        commands: Name -> command of a plugin.
        owners: Name of a command -> the plugin that brings it.
        token: Tells this registry from others in handles of operators.
        is_default: Whether it is that of the process, which other processes have alike.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None, only: Iterable[str] | None = None) -> None:
        self.problems: list[Problem] = []
        self.backends: dict[str, Backend] = {}
        self.schemes = BUILTIN
        self.solvers: dict[str, Solver] = {}
        self._ours: list[tuple[str, pluggy.PluginManager]] = []  # own plugins by name, for their formats
        self._added_formats: dict[str, CheckpointFormat] = {}
        self.commands: dict[str, Callable[..., None]] = {}
        self.owners: dict[str, str] = {}
        self.token, self.is_default = token_hex(4), False
        self._names: dict[str, str] = {}  # kind of device -> plugin
        self._added: list[tuple[str, str, tuple[Kernel, ...]]] = []  # plugin, kind of device, kernels
        self._loaded: dict[str, object] = {}  # plugins by name
        self._seconds = time_limit()
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
            self.set_aside(plugin, stage, error)
            return None

    def set_aside(self, plugin: str, stage: str, error: Exception) -> None:
        """Records that a plugin failed, and warns.

        Args:
            plugin: Its name.
            stage: Where: ``import``, ``detection``, ``kernels`` or ``command``.
            error: What it raised.
        """
        text = f"{type(error).__name__}: {error}"
        self.problems.append(Problem(plugin, stage, text))
        warnings.warn(
            f"quantport set plugin {plugin!r} aside at {stage}: {text}", RuntimeWarning, stacklevel=3
        )

    def _load(self, point: EntryPoint) -> None:
        if point.name in self._loaded:
            raise BackendError(
                f"load plugin {point.name!r} from {point.value}",
                f"a plugin of this name is loaded already: {self._loaded[point.name]!r}",
                "rename one of the two entry points, or uninstall one package",
            )
        bring = partial(self._bring, point)
        brought = bring() if is_builtin(point) else answer(bring, self._seconds)  # ours needs no thread
        self._loaded[point.name] = brought.plugin
        self.schemes = brought.schemes
        self.solvers, self._added_formats = (
            self.solvers | brought.solvers,
            self._added_formats | brought.formats,
        )
        self.commands |= brought.commands
        self.owners |= dict.fromkeys(brought.commands, point.name)
        self._added += [(point.name, kind, added) for kind, added in brought.kernels]
        for backend in brought.backends:
            self.backends[backend.kind] = backend
            self._names[backend.kind] = point.name

    def _bring(self, point: EntryPoint) -> _Brought:
        """Imports a plugin and asks its hooks. Changes nothing here: one that is late may still be at it when
        it has been set aside.
        """
        name, plugin, ours = point.name, point.load(), is_builtin(point)
        manager = pluggy.PluginManager("quantport")
        manager.add_hookspecs(hookspecs)
        register(manager, plugin, name)
        backends = called(manager, "quantport_backend", name)
        if self._allowed is not None and name not in self._allowed:
            backends = []  # a plugin that brings more than a backend, which is left out on purpose
        if point.group == BACKENDS and not backends:
            raise BackendError(
                f"load backend {name!r}", "no quantport_backend hook in it", "mark one with @hookimpl"
            )
        for backend in backends:
            check_backend(name, backend, self.backends)
        schemes = called(manager, "quantport_schemes", name)
        solvers = named(name, called(manager, "quantport_solvers", name), Solver, self.solvers)
        merged = Schemes(
            (*self.schemes.values(), *(s for some in schemes for s in some)),
            (*self.solvers.values(), *solvers.values()),
        )
        if ours:
            self._ours.append((name, manager))
        formats = [] if ours else called(manager, FORMATS_HOOK, name)
        taken = self._own_formats | self._added_formats if formats else {}
        return _Brought(
            plugin,
            backends,
            merged,
            solvers,
            formats_by_name(name, formats, taken),
            added_kernels(name, called(manager, "quantport_kernels", name)),
            commands(name, called(manager, "quantport_commands", name), self.commands),
        )

    @once_property
    def _own_formats(self) -> dict[str, CheckpointFormat]:
        """Those of quantport's own plugins, which take as long to import as all the rest of them: not before
        somebody reads a checkpoint.
        """
        formats: dict[str, CheckpointFormat] = {}
        for name, manager in self._ours:
            formats |= formats_by_name(name, called(manager, FORMATS_HOOK, name), formats)
        return formats

    @once_property
    def formats(self) -> dict[str, CheckpointFormat]:
        """Name -> checkpoint format of a plugin, quantport's own first."""
        return self._own_formats | self._added_formats

    @once_property
    def devices(self) -> tuple[Device, ...]:
        """Every device found, best rank first. A detection that raises, or hangs, is a problem, not an error:
        all are asked side by side.
        """
        ordered = sorted(self.backends.values(), key=lambda backend: -backend.rank)
        calls = [partial(members, f"detection of {b.kind!r}", b.detect, Device, b.kind) for b in ordered]
        devices: list[Device] = []
        for backend, outcome in zip(ordered, answers(calls, self._seconds), strict=True):
            if isinstance(outcome, Exception):
                self.set_aside(self._names[backend.kind], "detection", outcome)
            else:
                devices += outcome
        return tuple(devices)

    @once_property
    def _kernels(self) -> dict[str, tuple[Kernel, ...]]:
        out: dict[str, tuple[Kernel, ...]] = {}
        owners: dict[str, Kernel] = {}
        for kind, backend in self.backends.items():
            call = partial(members, f"kernels of {kind!r}", backend.kernels, Kernel)
            kernels = self._try(self._names[kind], "kernels", answer, call, self._seconds) or ()
            own = self._try(self._names[kind], "kernels", check_kernels, kind, kernels, owners)
            out[kind] = kernels if own is not None else ()
            owners |= own or {}
        for plugin, kind, kernels in self._added:
            if kind in self.backends or self._allowed is None:  # else the backend was left out on purpose
                own = self._try(plugin, "kernels", self._check_added, kind, kernels, owners)
                out[kind] = (*out.get(kind, ()), *(kernels if own is not None else ()))
                owners |= own or {}
        return out

    def advice(self, kind: str) -> tuple[str, ...]:
        """What is missing for hardware of a kind that can be seen but not used.

        Raises:
            Exception: whatever the backend raises; a ``TimeoutError`` where it does not answer in time.
        """
        call = partial(members, f"advice of {kind!r}", self.backends[kind].advice, str)
        return answer(call, self._seconds)

    def _check_added(
        self, kind: str, kernels: tuple[Kernel, ...], owners: dict[str, Kernel]
    ) -> dict[str, Kernel]:
        if kind not in self.backends:
            known = one_of(kind, self.backends)
            raise BackendError(f"add kernels to devices of kind {kind!r}", "no backend has it", known)
        return check_kernels(kind, kernels, owners)

    def kernels(self, kind: str) -> tuple[Kernel, ...]:
        """The kernels of one kind of device."""
        return self._kernels.get(kind, ())

    @once_property
    def _kv_kernels(self) -> dict[str, KVKernel]:
        out: dict[str, KVKernel] = {}
        for kind, backend in self.backends.items():
            call = partial(kv_kernel_of, backend)
            found = self._try(self._names[kind], "KV kernel", answer, call, self._seconds)
            out |= {kind: found} if found else {}
        return out

    def kv_kernel(self, device: torch.device) -> KVKernel | None:
        """What the backend of a torch device brings for the quantized KV cache; None for nothing."""
        try:
            return self._kv_kernels.get(self._of_torch(device).kind)
        except DeviceError:  # as for meta tensors
            return None

    def kernel(self, name: str) -> Kernel:
        """One kernel by name.

        Raises:
            BackendError: no loaded backend has it.
        """
        table = self._by_name
        if name not in table:
            raise BackendError(f"kernel {name!r}", "no loaded backend has it", one_of(name, table))
        return table[name]

    def identifies(self, kernel: Kernel, scheme: Scheme) -> bool:
        """Whether the names of a kernel and a scheme find the same ones here."""
        known = self._by_name.get(kernel.name)
        return (
            type(known) is type(kernel)
            and scheme.name in self.schemes
            and self.schemes[scheme.name] == scheme
        )

    @once_property
    def _by_name(self) -> dict[str, Kernel]:
        return {k.name: k for kernels in self._kernels.values() for k in kernels}

    def device(self, asked: str | torch.device | Device = "auto") -> Device:
        """Resolves a device: ``auto``, ``kind``, ``kind:index``, or torch's; or, simulated and for planning,
        ``kind:arch``, ``arch`` or the name of a product.

        Raises:
            DeviceError: the kind, architecture or product is unknown, or no such device was found.
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
        kind = kind.strip().lower()
        if kind not in self.backends:
            aside = [p for p in self.problems if p.plugin == kind]
            found = "no backend has this kind, and none knows an architecture or a product of this name"
            found = f"its backend was set aside: {aside[0].error}" if aside else found
            return self._device_names.simulated(text, text, found)
        if rest and not (rest.isascii() and rest.isdigit() and len(rest) < 10):
            found = f"{kind} has no architecture and no product {rest[:80]!r}"
            return self._device_names.simulated(text, rest, found, kind)
        here = [d for d in self.devices if d.kind == kind]
        matching = [d for d in here if not rest or d.index == int(rest)]
        if not matching:
            raise self._absent(text, kind, len(here))
        return matching[0]

    @cached_property
    def _device_names(self) -> DeviceNames:
        return DeviceNames(self.backends)

    def with_memory_now(self, device: Device) -> Device:
        """A found device with the memory that is free on it at this moment; any other one as it is."""
        if not any(device is found for found in self.devices):
            return device
        call = partial(memory_of, self.backends[device.kind], device)
        outcome = self._try(self._names[device.kind], "memory", answer, call, self._seconds)
        return device if outcome is None else replace(device, memory=outcome[0])

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
