"""The manual for authors: every hook that quantport calls.

A plugin is a module with functions marked ``@quantport.backend.hookimpl``, published under the entry-point
group ``quantport.backends`` (devices) or ``quantport.plugins`` (schemes). A plugin that fails is set aside,
by name and reason: one warning, and a row in ``quantport doctor``. It never stops the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import pluggy
from torch import Tensor

from quantport.device import Arch, Device
from quantport.kernels.base import Kernel, StoredWeight
from quantport.scheme import Scheme

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
    """

    kind: str
    torch_type: str
    rank: int = 10
    archs: Mapping[str, Arch]

    @abstractmethod
    def detect(self) -> Sequence[Device]:
        """Looks for devices. Must be quick and must not import a vendor runtime that is not installed.

        An exception is allowed: it becomes a row in ``quantport doctor`` and means "no device".
        """

    @abstractmethod
    def kernels(self) -> Sequence[Kernel]:
        """Returns every kernel; which of them takes a request is theirs to say. Names are unique over all
        backends, except for the shared instances of ``quantport.backend.aten``."""

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

    def advice(self) -> Sequence[str]:
        """Returns what is missing for hardware that can be seen but not used, with the command that
        mends it.
        """
        return ()


@hookspec
def quantport_backend() -> Backend:  # type: ignore[empty-body]  # a specification: pluggy calls the implementations
    """Returns the backend of this plugin. Called once; detection happens later, when somebody asks for
    devices.
    """


@hookspec
def quantport_schemes() -> Sequence[Scheme]:  # type: ignore[empty-body]  # a specification, as above
    """Returns additional schemes. A name or an alias that is taken sets the whole plugin aside."""
