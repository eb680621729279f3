"""What a plugin must be before any of it is taken."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from quantport.device import Arch, Device
from quantport.errors import BackendError, did_you_mean, shown
from quantport.kernels import aten
from quantport.kernels.base import Kernel
from quantport.kernels.grouped import GroupedKernel
from quantport.kvcache.kernel import KVKernel
from quantport.plugins import hookspecs
from quantport.plugins.hookspecs import Backend

if TYPE_CHECKING:
    from quantport.checkpoint.format import CheckpointFormat

FORMATS_HOOK = "quantport_checkpoint_formats"
COMMANDS = ("bench", "devices", "doctor", "inspect", "matrix", "plan", "quantize", "run")
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("quantport_"))
_UNORDERED = ("wrapper", "hookwrapper", "tryfirst", "trylast")
# Attributes that authors may still set under the names that they had.
_RENAMED = {
    "deviation": "numeric_deviation",
    "bundle": "GroupedKernel.prepare_grouped",
    "stack": "GroupedKernel.allocate",
    "slot": "GroupedKernel.expert_view",
}
_RENAMED_OF_ARCH = {"opaque": "storage_only_dtypes"}
_OF_GROUPED = ("run_grouped", "run_gated")
_COMMAND = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_KIND = re.compile(r"[a-z][a-z0-9_]*")


def _are_archs(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(arch, Arch) for name, arch in value.items()
    )


_ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (
        lambda v: isinstance(v, str) and bool(_KIND.fullmatch(v)) and v != "auto",
        "lower-case letters, digits and '_', and not 'auto'",
    ),
    "torch_type": (lambda v: isinstance(v, str) and v.isidentifier(), "the type of a torch.device"),
    "rank": (lambda v: isinstance(v, int), "a whole number"),
    "archs": (_are_archs, "a mapping of names to quantport.backend.Arch"),
    "products": (_are_archs, "a mapping of names to quantport.backend.Arch"),
}


def register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Registers the hooks of a plugin.

    Raises:
        BackendError: it has a function that looks like a hook and is none, or one that wants to wrap others.
        PluginValidationError: a hook of it takes arguments.
    """
    for attribute, value in inspect.getmembers(plugin, inspect.isroutine):
        mine = getattr(value, "__module__", None) == getattr(plugin, "__name__", None)
        if attribute.startswith("quantport_") and mine and not hasattr(value, "quantport_impl"):
            suggestion = (
                "mark it with @quantport.backend.hookimpl" if attribute in HOOKS else _hook_like(attribute)
            )
            raise BackendError(f"load plugin {name!r}", f"{attribute} is no hook implementation", suggestion)
    manager.register(plugin, name)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError:
        unknown = [c.name for c in manager.get_hookcallers(plugin) or () if not c.has_spec()]
        raise BackendError(
            f"load plugin {name!r}", f"{', '.join(unknown)}: no hook of this name", _hook_like(unknown[0])
        ) from None
    for caller in manager.get_hookcallers(plugin) or ():
        for impl in caller.get_hookimpls():
            refused = [option for option in _UNORDERED if getattr(impl, option)]
            if impl.plugin is plugin and refused:
                raise BackendError(
                    f"load plugin {name!r}",
                    f"{impl.function.__name__} is marked {', '.join(refused)}",
                    "@hookimpl alone: hooks are asked plugin by plugin, with nothing to wrap or to order",
                )


def _hook_like(name: str) -> str:
    return f"{did_you_mean(name, HOOKS)}hooks: {', '.join(HOOKS)}"


def called(manager: pluggy.PluginManager, hook: str, plugin: str) -> list[Any]:
    """What the implementations of one hook in one plugin return; None is an answer."""
    impls = getattr(manager.hook, hook).get_hookimpls()
    return [impl.function() for impl in impls if impl.plugin_name == plugin]


def check_backend(plugin: str, backend: object, backends: Mapping[str, Backend]) -> None:
    """Refuses a backend that is none, that lacks an attribute or has a wrong one, or whose kind is taken.

    Raises:
        BackendError: says which.
    """
    if not isinstance(backend, Backend):
        raise BackendError(
            f"load backend {plugin!r}", f"its hook returned {backend!r}", "a quantport.backend.Backend"
        )
    for attribute, (is_valid, needs) in _ATTRIBUTES.items():
        if not hasattr(backend, attribute) or not is_valid(getattr(backend, attribute)):
            found = shown(getattr(backend, attribute)) if hasattr(backend, attribute) else "nothing"
            raise BackendError(f"load backend {plugin!r}", f"its {attribute} is {found}", needs)
    if backend.kind in backends:
        raise BackendError(
            f"load backend {plugin!r} for devices of kind {backend.kind!r}",
            f"{type(backends[backend.kind]).__module__} serves this kind already",
            "give the new backend a kind of its own, or restrict with QUANTPORT_BACKENDS",
        )
    for name, arch in backend.archs.items():
        _refuse_old_names(f"architecture {name!r}", arch, _RENAMED_OF_ARCH)


def members(
    what: str, call: Callable[[], Iterable[Any]], kind: type[Any], device: str = ""
) -> tuple[Any, ...]:
    """What a method of a backend returns, if that is a sequence of what it must be.

    Args:
        what: For errors.
        call: The method.
        kind: Type of the members.
        device: The kind of device that they must be of, where they are devices.

    Raises:
        BackendError: it is something else.
    """
    answer = call()
    sequence = () if isinstance(answer, str) else tuple(answer)
    if isinstance(answer, str) or not all(isinstance(member, kind) for member in sequence):
        raise BackendError(what, f"it gave {shown(answer)}", f"a sequence of {kind.__name__}")
    for member in sequence if device else ():
        if not isinstance(member.arch, Arch) or member.kind != device:
            raise BackendError(what, f"it gave {shown(member)}", f"devices of kind {device!r}")
    return sequence


def memory_of(backend: Backend, device: Device) -> tuple[int | None]:
    """What a backend says of the memory of a device, in a tuple: None is an answer.

    Raises:
        BackendError: it is no number of bytes.
    """
    memory = backend.memory(device)
    if memory is not None and (not isinstance(memory, int) or memory < 0):
        raise BackendError(f"memory of {device}", f"it gave {shown(memory)}", "bytes, or None")
    return (memory,)


def kv_kernel_of(backend: Backend) -> KVKernel | None:
    """What a backend brings for the quantized KV cache.

    Raises:
        BackendError: it is something else.
    """
    kernel = backend.kv_kernel()
    if kernel is not None and not isinstance(kernel, KVKernel):
        raise BackendError(
            f"KV kernel of {backend.kind!r}",
            f"it gave {shown(kernel)}",
            "a quantport.backend.KVKernel, or None",
        )
    return kernel


def check_kernels(kind: str, kernels: Sequence[Kernel], owners: Mapping[str, Kernel]) -> dict[str, Kernel]:
    """Refuses kernels whose names are taken, or that use a contract of before.

    Args:
        kind: Kind of the backend.
        kernels: Its kernels.
        owners: Name -> kernel of the backends before it.

    Returns:
        Name -> kernel, for those whose name is new.

    Raises:
        BackendError: names the first.
    """
    own: dict[str, Kernel] = {}
    for kernel in kernels:
        if not isinstance(kernel.name, str) or not kernel.name:
            raise BackendError(
                f"load the kernels of {kind!r}", f"{kernel!r} has no name", "a name, as a text"
            )
        _refuse_old_names(f"kernel {kernel.name!r}", kernel, _RENAMED)
        ignored = [name for name in _OF_GROUPED if hasattr(kernel, name)]
        if ignored and not isinstance(kernel, GroupedKernel):
            found = f"it has {', '.join(ignored)}, which nobody calls on a plain Kernel"
            raise BackendError(f"load kernel {kernel.name!r}", found, "derive it from GroupedKernel")
        owner = owners.get(kernel.name) or own.get(kernel.name)
        shared = type(kernel) is type(owner) and type(kernel).__module__ == aten.__name__
        if owner is not None and owner is not kernel and not shared:
            raise BackendError(
                f"load the kernels of {kind!r}",
                f"kernel name {kernel.name!r} is taken by {type(owner)!r}",
                "a name of its own for each kernel: saved models find kernels by name",
            )
        if owner is None:
            own[kernel.name] = kernel
    return own


def _refuse_old_names(what: str, value: object, renamed: Mapping[str, str]) -> None:
    for old, new in renamed.items():
        if hasattr(value, old):
            raise BackendError(f"load {what}", f"it sets {old}, which nobody reads", f"call it {new}")


def named(plugin: str, answers: Iterable[Any], kind: type[Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """The members of sequences that a hook returned, by name.

    Raises:
        BackendError: one is of another type, or its name is taken.
    """
    new: dict[str, Any] = {}
    for member in (member for answer in answers for member in answer):
        if not isinstance(member, kind):
            raise BackendError(
                f"load plugin {plugin!r}", f"its hook returned {member!r}", f"a sequence of {kind.__name__}"
            )
        _refuse_taken(plugin, kind.__name__, member.name, (*table, *new))
        new[member.name] = member
    return new


def formats_by_name(
    plugin: str, answers: Sequence[Any], table: Mapping[str, CheckpointFormat]
) -> dict[str, CheckpointFormat]:
    """The checkpoint formats that a hook returned, by name; none where there is no such hook.

    Args:
        plugin: Its name.
        answers: What the hook returned.
        table: Those of the plugins before it.

    Raises:
        BackendError: one is no format, or its name is taken.
    """
    if not answers:
        return {}
    from quantport.checkpoint.format import CheckpointFormat
    from quantport.checkpoint.plain_format import PlainFormat
    from quantport.checkpoint.recognize import BUILTIN_FORMATS

    taken = {own.name: own for own in (*BUILTIN_FORMATS, PlainFormat())} | dict(table)
    return named(plugin, answers, CheckpointFormat, taken)


def added_kernels(plugin: str, answers: Iterable[Any]) -> list[tuple[str, tuple[Kernel, ...]]]:
    """The kernels that a hook returned for kinds of devices of others.

    Raises:
        BackendError: one is no kernel.
    """
    added = [(kind, tuple(kernels)) for answer in answers for kind, kernels in answer.items()]
    for kernel in (kernel for _, kernels in added for kernel in kernels):
        if not isinstance(kernel, Kernel):
            raise BackendError(
                f"load plugin {plugin!r}", f"its hook returned {kernel!r}", "kind of device -> kernels"
            )
    return added


def commands(
    plugin: str, answers: Iterable[Any], table: Mapping[str, Callable[..., None]]
) -> dict[str, Callable[..., None]]:
    """The commands that a hook returned.

    Raises:
        BackendError: one cannot be called, or its name is taken, or cannot be typed.
    """
    new: dict[str, Callable[..., None]] = {}
    for name, function in (item for answer in answers for item in answer.items()):
        asked = f"load command {shown(name)} of {plugin!r}"
        if not isinstance(name, str) or not _COMMAND.fullmatch(name):
            found = "no name that can be typed as a command"
            raise BackendError(asked, found, "lower-case letters and digits, with '-' between them")
        if not callable(function):
            raise BackendError(asked, f"it is {function!r}", "a function")
        _refuse_taken(plugin, "command", name, (*COMMANDS, *table, *new))
        new[name] = function
    return new


def _refuse_taken(plugin: str, what: str, name: str, taken: Iterable[str]) -> None:
    if name in taken:
        raise BackendError(f"load {what} {name!r} of plugin {plugin!r}", "the name is taken", "another name")
