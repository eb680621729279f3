"""Measured speeds and evidence before what a kernel says itself (``tuned/<arch>.json``, see ``Tuned``).

``benchmarks/gpu.py --evidence`` writes the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantport.backend import Claim, Kernel, Request, Tuned, find_tuned
from quantport_triton import available


class Measured(Kernel):
    """Comes before a kernel among the bases of a class: what was measured is said before what it says."""

    def _tuned(self, request: Request) -> Tuned | None:
        tuned = find_tuned("quantport_cuda", self.name, request)
        if tuned and _made_with(tuned).get("triton") and not request.device.simulated and available():
            return None  # measured with Triton, which also quantizes for the kernels of torch
        return tuned

    def speed(self, request: Request) -> float | None:
        """The measured speed, else what the kernel itself says."""
        tuned = self._tuned(request)
        speed = tuned.speed(request) if tuned else None
        return super().speed(request) if speed is None else speed

    def claim(self, request: Request) -> Claim:
        """``measured`` with device, date, commit, versions and error; else what the kernel itself claims."""
        tuned = self._tuned(request)
        if tuned is None:
            return super().claim(request)  # type: ignore[safe-super]  # of the kernel that follows among the bases
        made_with = _made_with(tuned)
        versions = "".join(f", {name} {made_with[name]}" for name in ("torch", "triton") if name in made_with)
        return tuned.claim(tuned.table.get("results", ""), versions)


def _made_with(tuned: Tuned) -> Mapping[str, Any]:
    return {**tuned.table, **tuned.table["run"]}


def measured(kernel: type[Kernel]) -> type[Kernel]:
    """The class of a kernel, with ``Measured`` before it."""
    return type(
        kernel.__name__, (Measured, kernel), {"__doc__": kernel.__doc__, "__module__": kernel.__module__}
    )
