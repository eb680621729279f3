"""The manual for authors: every hook that quantport calls, in the order in which it calls them.

A plugin is a module with functions marked ``@quantport.backend.hookimpl``, published under the entry-point
group ``quantport.backends`` (devices) or ``quantport.plugins`` (everything else). A plugin of the first
group must bring a backend; either may implement any hook. Hooks take no arguments.

When: a registry imports every plugin and calls its hooks once, when the registry is made: that of the
process at the first use of quantport, not at its import. The plugins of quantport itself come first, then
others by group and name, so that nobody can take the name of what quantport brings.

Exceptions: a plugin that raises while it is imported or in a hook (``sys.exit()`` too), takes longer than 30
seconds (``QUANTPORT_PLUGIN_SECONDS``), returns something else than its hook says, or brings a name that is
taken, is set aside as a whole, by name and reason: one warning, a row in ``quantport doctor``, and nothing of
it is registered. It never stops the others. The same goes for a function called ``quantport_...`` that is no
hook, or is not marked. An ``optionalhook`` of another version is let pass. Hooks are asked plugin by plugin,
so there is nothing to wrap or to order: ``wrapper``, ``hookwrapper``, ``tryfirst`` and ``trylast`` are
refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import pluggy
from torch import Tensor

from quantport.device import Arch, Device
from quantport.kernels.base import Kernel, StoredWeight
from quantport.kvcache.kernel import KVKernel
from quantport.numerics.solvers import Solver
from quantport.scheme import Scheme

if TYPE_CHECKING:
    from quantport.checkpoint.format import CheckpointFormat

hookspec = pluggy.HookspecMarker("quantport")
hookimpl = pluggy.HookimplMarker("quantport")


class Backend(ABC):
    """One kind of device: which architectures exist, what is here, and what runs on it.

    Attributes:
        kind: Device kind, unique among the backends; the part before the colon of ``--device cpu:x86_vnni``.
        torch_type: ``torch.device`` type of its tensors.
        rank: ``device="auto"`` takes the found device of the highest rank. Accelerators: 10. Host
            processors: 0.
        archs: Every architecture that it knows, by name, found or not.
        products: Architectures by the full names of products (``Toy 2000``), which ``--device`` takes too:
            upper and lower case, spaces and hyphens do not count, and neither does a size of memory. Cite
            where they come from.
    """

    kind: str
    torch_type: str
    rank: int = 10
    archs: Mapping[str, Arch]
    products: Mapping[str, Arch] = MappingProxyType({})

    @abstractmethod
    def detect(self) -> Sequence[Device]:
        """Looks for devices. Must be quick and must not import a vendor runtime that is not installed.

        An exception is allowed: it becomes a row in ``quantport doctor`` and means "no device". So does no
        answer in 30 seconds; all backends are asked at the same time, each in a thread of its own.
        """

    @abstractmethod
    def kernels(self) -> Sequence[Kernel]:
        """Returns every kernel; which of them takes a request is theirs to say. Names are unique over all
        backends, except for the shared instances of ``quantport.backend.aten``."""

    def memory(self, device: Device) -> int | None:
        """Returns the bytes that a new allocation can get on a found device now; None where nobody knows.

        Asked for each time that something is planned for it.
        """
        return device.memory

    def quantize_weight(self, weight: Tensor, scheme: Scheme) -> StoredWeight | None:
        """Quantizes one weight faster than ``numerics.quantize_weight``, and equal to it byte for byte; None
        to decline.

        Args:
            weight: ``[n, k]`` on the device.
            scheme: The scheme. One with a ``solver`` must be declined: the codes are the solver's to find.

        Returns:
            The tensors of ``scheme.layout(n, k)``. Scales must be NaN or Inf where the weight holds NaN or
            Inf.
        """
        return None

    def kv_kernel(self) -> KVKernel | None:
        """Returns what makes rows of the quantized KV cache, and attends to them as they are stored; None
        where torch's operators do. It is asked once, when somebody first makes such a cache.
        """
        return None

    def measured_with(self) -> Mapping[str, object]:
        """Returns what a table of speeds that are measured now says beside the numbers, as JSON: what its
        kernels ask of it before they believe it.
        """
        return {}

    def advice(self) -> Sequence[str]:
        """Returns what is missing for hardware that can be seen but not used, with the command that
        mends it.
        """
        return ()


# --------------------------------------------------------------------------------
# Devices
# --------------------------------------------------------------------------------


@hookspec
def quantport_backend() -> Backend:  # type: ignore[empty-body]  # a specification: pluggy calls the implementations
    """Returns the backend of this plugin.

    Called once, when the registry is made; it must be quick and look for nothing. ``detect`` is called once,
    when somebody first asks for devices, and ``kernels`` once, when somebody first plans. An exception in
    either is a row in ``quantport doctor`` and an empty answer. Kinds and kernel names are unique over all
    backends.
    """


@hookspec
def quantport_kernels() -> Mapping[str, Sequence[Kernel]]:  # type: ignore[empty-body]  # a specification, as above
    """Returns additional kernels for devices that another plugin brings: kind of device -> kernels.

    Called once, when the registry is made. Of kernels that are equally good, that of the backend is chosen.
    A kind that no backend has sets the kernels aside when somebody first plans.
    """


# --------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------


@hookspec
def quantport_schemes() -> Sequence[Scheme]:  # type: ignore[empty-body]  # a specification, as above
    """Returns additional schemes. Called once, when the registry is made. Names and aliases are unique."""


@hookspec
def quantport_solvers() -> Sequence[Solver]:  # type: ignore[empty-body]  # a specification, as above
    """Returns additional solvers, which find codes and scales of weights. Called once, when the registry is
    made. Names are unique.
    """


# --------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------


@hookspec
def quantport_checkpoint_formats() -> Sequence[CheckpointFormat]:  # type: ignore[empty-body]  # a specification, as above
    """Returns additional formats of checkpoints. Called once, when the registry is made; in
    quantport's own plugins, when a format is first asked for. Names are unique.
    """


# --------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------


@hookspec
def quantport_commands() -> Mapping[str, Callable[..., None]]:  # type: ignore[empty-body]  # a specification, as above
    """Returns additional commands: name -> function, with parameters as typer takes them.

    Called once, when the registry is made: at every start of the command line where plugins are installed,
    so the functions should import what they need when they run. Names are lower-case letters and digits, with
    ``-`` between them; those of the commands of quantport itself are taken.
    """
