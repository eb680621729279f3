"""What the kernels of the room share: measured speeds and errors as data, and the claim that follows from
them.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantport.backend import (
    Claim,
    Evidence,
    GroupedKernel,
    Kernel,
    Measurement,
    Packed,
    Request,
    WeightSpec,
    loop_over_groups,
)
from quantport_cpu.jit import available
from quantport_cpu.kernels.scratch import scratch

TINY = torch.finfo(torch.float32).tiny


SMALLEST = 16  # a layer with fewer elements than the measured one by this factor has no known speed
COMPILED = (
    64  # up to this many rows, compiled kernels that take a few rows at a time beat decoding a whole block
)
_AT_ONCE = 8  # rows that they take at a time
_PANEL = 128  # rows of a panel: 2 MiB of fp32 at K = 4096


def by_few(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs a kernel for few rows over more rows: fp32 ``[M, N]``."""
    if x.shape[0] <= _AT_ONCE:
        return run(x)
    return torch.cat([run(part) for part in x.split(_AT_ONCE)])


@cache
def has_fast_dots() -> bool:
    """Whether compiled kernels run here, and one instruction of theirs sums four products of bytes."""
    if available():
        return False
    from quantport_cpu.jit.target import host_target

    return host_target().dot_bits > 0


def by_panels(x: Tensor, n: int, decode: Callable[[int, Tensor], Tensor]) -> Tensor:
    """x fp32 ``[M, K]`` times a weight that is decoded to fp32 in panels of rows which stay in cache: fp32
    ``[M, N]``.

    Args:
        x: Activations.
        n: Rows of the weight.
        decode: Writes the rows from a first one on into ``[rows, K]``, and returns them.
    """
    y = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
    for r in range(0, n, _PANEL):
        panel = scratch(x, torch.float32, min(_PANEL, n - r), x.shape[1])
        y[:, r : r + _PANEL] = torch.mm(x, decode(r, panel).t())
    return y


@cache
def measured(arch: str) -> dict[str, Any]:
    """The measurements of one architecture (``tuned/<arch>.json``, written by ``benchmarks/linear.py``), or
    nothing.
    """
    path = files("quantport_cpu") / "tuned" / f"{arch}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Few(NamedTuple):
    """Rows ``start`` to ``stop - 1``, few, that share the weights of one group."""

    group: int
    start: int
    stop: int


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
        nearest = min(speeds, key=lambda m: abs(math.log(int(m) / request.num_tokens)))
        return float(speeds[nearest])

    def claim(self, request: Request) -> Claim:
        """``measured`` where this architecture was measured, with device, date and error; else
        ``declared``.
        """
        row = self._row(request)
        if not row:
            return Claim(Evidence.DECLARED, f"{self.made_of}; not yet measured on this architecture")
        run = measured(request.device.arch.name)["run"]
        how = ", with numba" if measured(request.device.arch.name).get("compiled") else ""
        where = (
            f"{run['device']}, {run['date']}, commit {run['commit']}{how}, relative error {row['error']:.1e}"
        )
        proof = Measurement(
            f"quantport_cpu/tuned/{request.device.arch.name}.json", run["device"], run["date"], run["commit"]
        )
        return Claim(
            Evidence.MEASURED, f"benchmarks/results/linear-{request.device.arch.name}.md ({where})", proof
        )


class CpuGrouped(GroupedKernel, CpuKernel):
    """A kernel with compiled code for groups of few rows: all of them, gate and up together, in one
    launch.
    """

    def limit(self, spec: WeightSpec) -> int:
        """Rows of a group up to which the compiled code takes it; 0 where it cannot run."""
        return 0

    @abstractmethod
    def few(self, x: Tensor, groups: Sequence[Few], stack: Packed, spec: WeightSpec, shared: int) -> Tensor:
        """``run_grouped`` of these groups, whose rows are all of ``x``: fp32 ``[M, shared * N]``, no
        bias.
        """

    def run_grouped(
        self,
        x: Tensor,
        offsets: Tensor,
        stack: Packed,
        bias: Tensor | None,
        spec: WeightSpec,
        shared: int = 1,
    ) -> Tensor:
        bounds, limit = offsets.tolist(), self.limit(spec)
        groups = [Few(g, a, b) for g, (a, b) in enumerate(pairwise(bounds)) if 0 < b - a <= limit]
        if not groups or bias is not None:
            return loop_over_groups(
                lambda rows, packed, part: self.run(rows, packed, part, spec),
                x,
                bounds,
                lambda g, j: self.expert_view(stack, g, j),
                bias,
                spec.n,
                shared,
            )
        count = sum(b - a for _, a, b in groups)
        if count == x.shape[0]:
            return self.few(x, groups, stack, spec, shared).to(x.dtype)
        rest = [0 if b - a <= limit else b - a for a, b in pairwise(bounds)]
        rows = torch.cat([torch.arange(a, b, dtype=torch.int64, device=x.device) for _, a, b in groups])
        starts = accumulate((b - a for _, a, b in groups), initial=0)
        moved = [
            Few(f.group, start, start + f.stop - f.start) for f, start in zip(groups, starts, strict=False)
        ]
        out = x.new_empty(x.shape[0], shared * spec.n)
        out[rows] = self.few(x[rows], moved, stack, spec, shared).to(x.dtype)
        for g in (g for g, many in enumerate(rest) if many):
            own = x[bounds[g] : bounds[g + 1]]
            for j in range(shared):
                out[bounds[g] : bounds[g + 1], j * spec.n : (j + 1) * spec.n] = self.run(
                    own, self.expert_view(stack, g, j), None, spec
                )
        return out


def jobs_of(
    groups: Sequence[Few], shared: int, columns: int
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """Jobs for the compiled code, which see the weights of these groups only, and which weights those are.

    Args:
        groups: The groups.
        shared: Weights of each.
        columns: Columns of the result of one weight.

    Returns:
        ``(start, stop, place of the weight in the list, column)`` of each, and the list: indices of weights.
    """
    used = [shared * f.group + j for f in groups for j in range(shared)]
    return [
        (f.start, f.stop, shared * i + j, j * columns) for i, f in enumerate(groups) for j in range(shared)
    ], used


def some(stacked: Tensor, used: Sequence[int]) -> list[Tensor]:
    """Some of the weights ``[groups, shared, ...]``, by number."""
    flat = stacked.flatten(0, 1)
    return [flat.select(0, i) for i in used]


def by_group(scales: Tensor, used: Sequence[int], groups: Sequence[Few], columns: int) -> Tensor:
    """Scales of output channels as fp32 ``[M, shared * columns]``: a line for each row.

    Args:
        scales: ``[groups, shared, N, 1]`` of a stack, N being ``columns``, or 1 for one scale of a weight.
        used: The weights of these groups, by number.
        groups: The groups.
        columns: Columns of the result of one weight.
    """
    chosen = torch.tensor(used, dtype=torch.int64, device=scales.device)
    lines = scales.flatten(0, 1).flatten(1).index_select(0, chosen).expand(-1, columns)
    lines, counts = lines.reshape(len(groups), -1), [f.stop - f.start for f in groups]
    return (
        lines
        if max(counts) == 1
        else lines.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device=lines.device), 0)
    )
