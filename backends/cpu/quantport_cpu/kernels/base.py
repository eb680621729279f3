"""What the kernels of the room share: measured speeds and errors as data, and the claim that follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from quantport.backend import Claim, Evidence, Kernel, Request
from quantport_cpu.jit import available

TINY = torch.finfo(torch.float32).tiny


SMALLEST = 16  # a layer with fewer elements than the measured one by this factor has no known speed
COMPILED = 64  # up to this many rows, compiled kernels that take a few rows at a time beat decoding a whole block
_AT_ONCE = 8  # rows that they take at a time


def by_few(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs a kernel for few rows over more rows: fp32 ``[M, N]``."""
    if x.shape[0] <= _AT_ONCE:
        return run(x)
    return torch.cat([run(part) for part in x.split(_AT_ONCE)])


@cache
def compiled() -> bool:
    """Whether the compiled integer kernels run here: numba, and AVX512-VNNI."""
    if available():
        return False
    from quantport_cpu.jit.gemv import vnni_reason

    return not vnni_reason()


@cache
def measured(arch: str) -> dict[str, Any]:
    """The measurements of one architecture (``tuned/<arch>.json``, written by ``benchmarks/linear.py``), or nothing."""
    path = files("quantport_cpu") / "tuned" / f"{arch}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class CpuKernel(Kernel):
    """A kernel whose speed and evidence come from the measurements of the architecture."""

    made_of = "torch's CPU operators"

    def _row(self, request: Request) -> dict[str, Any]:
        table = measured(request.device.arch.name)
        if table.get("compiled") and not request.device.simulated and available():
            return {}  # measured with compiled kernels, which this machine lacks
        schemes = table.get("schemes", {})
        row: dict[str, Any] = schemes.get(request.weight.scheme.name, {})
        return row if row.get("kernel") == self.name else {}

    def speed(self, request: Request) -> float | None:
        """The measured ratio at the nearest number of rows (on a log scale), against prepacked BF16."""
        speeds = self._row(request).get("speed", {})
        n, k = measured(request.device.arch.name).get("shape", (0, 0))
        if not speeds or SMALLEST * request.weight.n * request.weight.k < n * k:
            return None  # in a small layer the overhead of the call decides, which the table does not know
        nearest = min(speeds, key=lambda m: abs(math.log(int(m) / request.rows)))
        return float(speeds[nearest])

    def claim(self, request: Request) -> Claim:
        """``measured`` where this architecture was measured, with device, date and error; else ``declared``."""
        row = self._row(request)
        if not row:
            return Claim(Evidence.DECLARED, f"{self.made_of}; not yet measured on this architecture")
        run = measured(request.device.arch.name)["run"]
        how = ", with numba" if measured(request.device.arch.name).get("compiled") else ""
        where = f"{run['device']}, {run['date']}, commit {run['commit']}{how}, relative error {row['error']:.1e}"
        return Claim(Evidence.MEASURED, f"benchmarks/results/linear-{request.device.arch.name}.md ({where})")
