"""Measurements: the speeds by which kernels are chosen, and the evidence that follows from them.

``tuned/<arch>.json`` exists where an architecture was measured; ``benchmarks/gpu.py --evidence`` writes it::

    {"results": "benchmarks/results/nvidia-h200.json",
     "run": {"device": "NVIDIA H200", "date": "2026-12-01", "commit": "1a2b3c4",
             "torch": "2.11.0", "triton": "3.6.0"},
     "shape": [4096, 4096],
     "kernels": {"cuda._scaled_mm": {
         "fp8_per_channel": {"error": 0.0012, "speeds": {"1": 1.1, "512": 1.7}}}}}

``speeds`` are relative to BF16 by ``F.linear`` in the same run, by rows of activations, for a weight of
``shape``; ``error`` is the largest relative error against the reference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from quantport.backend import Claim, Evidence, Kernel, Measurement, Request
from quantport_triton import available

SMALLEST = 16  # a layer this many times smaller than the measured one has no known speed


@cache
def measurements(arch: str) -> Mapping[str, Any]:
    """The measurements of an architecture, or nothing."""
    path = files("quantport_cuda") / "tuned" / f"{arch}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Measured(Kernel):
    """A base class before that of a kernel: measured speeds and evidence replace the kernel's own."""

    def _row(self, request: Request) -> dict[str, Any]:
        device = request.device
        if not device.simulated and available():
            return {}  # all was measured with Triton, which also quantizes for the kernels of torch
        schemes = measurements(device.arch.name).get("kernels", {}).get(self.name, {})
        row: dict[str, Any] = schemes.get(request.weight.scheme.name, {})
        return row

    def speed(self, request: Request) -> float | None:
        """The measured ratio at the nearest number of rows, on a log scale."""
        speeds = self._row(request).get("speeds", {})
        n, k = measurements(request.device.arch.name).get("shape", (0, 0))
        if not speeds or SMALLEST * request.weight.n * request.weight.k < n * k:
            # The time of a small layer is that of its launches, which was not measured.
            return super().speed(request)
        nearest = min(speeds, key=lambda m: abs(math.log(int(m) / request.num_tokens)))
        return float(speeds[nearest])

    def claim(self, request: Request) -> Claim:
        """``measured`` with device, date, commit, versions and error; else what the kernel itself claims."""
        row = self._row(request)
        if not row:
            return super().claim(request)  # type: ignore[safe-super]  # that of the kernel
        table = measurements(request.device.arch.name)
        run = table["run"]
        where = (
            f"{run['device']}, {run['date']}, commit {run['commit']}, torch {run['torch']}, triton "
            f"{run['triton']}"
        )
        proof = Measurement(
            f"quantport_cuda/tuned/{request.device.arch.name}.json", run["device"], run["date"], run["commit"]
        )
        return Claim(
            Evidence.MEASURED, f"{table['results']} ({where}, relative error {row['error']:.1e})", proof
        )


def measured(kernel: type[Kernel]) -> type[Kernel]:
    """The class of a kernel, with ``Measured`` before it."""
    return type(
        kernel.__name__, (Measured, kernel), {"__doc__": kernel.__doc__, "__module__": kernel.__module__}
    )
