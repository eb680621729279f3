"""What the kernels of the room share: measured speeds, products by parts, and groups of rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quantport.backend import (
    Claim,
    Device,
    Evidence,
    GroupedKernel,
    Kernel,
    Packed,
    Request,
    Tuned,
    WeightSpec,
    find_tuned,
    loop_over_groups,
)
from quantport_cpu.features import usable_features
from quantport_cpu.jit import why_unavailable
from quantport_cpu.jit.jobs import Job
from quantport_cpu.kernels.scratch import scratch

if TYPE_CHECKING:
    from quantport_cpu.jit.token_batch import Token

TINY = torch.finfo(torch.float32).tiny
COMPILED_MAX_ROWS = 64  # up to this many rows, compiled kernels of small batches beat decoding panels
_COMPILED_MAX_ROWS_WITH_BF16 = 32  # where the processor multiplies panels of bf16
PANEL_ROWS = 256  # of a weight that is decoded: 4 MiB of fp32 at K = 4096


def why_unavailable_on(device: Device) -> str:
    """Why the compiled kernel does not run on a device, or '' where it does."""
    if not device.simulated:
        return why_unavailable()
    return "the compiled kernels need AVX2, or 64-bit Arm" if device.arch.name == "generic" else ""


@cache
def has_bf16_dots() -> bool:
    """Whether torch multiplies bf16 here by instructions made for it, and not by those of fp32."""
    return bool({"avx512_bf16", "amx_bf16"} & usable_features())


def multiply_by_panels(x: Tensor, n: int, columns: int, decode: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Multiplies by a weight that is decoded in panels of rows, which stay in cache.

    Panels are fp32, or bf16 where activations are and the processor multiplies it: then weights are rounded
    once more, and so are the products.

    Args:
        x: Activations ``[M, K]``.
        n: Rows of the weight.
        columns: Columns of the weight, from K on: those beyond it count for nothing.
        decode: Writes the rows from a first one on into ``[rows, columns]``, and returns them.

    Returns:
        fp32 ``[M, N]``.
    """
    dtype = torch.bfloat16 if x.dtype is torch.bfloat16 and has_bf16_dots() else torch.float32
    x = torch.nn.functional.pad(x.to(dtype), (0, columns - x.shape[1]))
    y = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
    for r in range(0, n, PANEL_ROWS):
        panel = scratch(x, dtype, min(PANEL_ROWS, n - r), columns)
        y[:, r : r + len(panel)] = torch.mm(x, decode(r, panel).t())
    return y


def compiled_max_rows() -> int:
    """Up to how many rows of 16-bit activations compiled kernels of small batches are fastest."""
    return _COMPILED_MAX_ROWS_WITH_BF16 if has_bf16_dots() else COMPILED_MAX_ROWS


class RowRange(NamedTuple):
    """Rows ``start`` to ``stop - 1`` of the activations, which are multiplied by the weights of ``group``."""

    group: int
    start: int
    stop: int


class CpuKernel(Kernel):
    """A kernel whose speed and evidence come from the measurements of the architecture.

    ``benchmarks/linear.py`` writes them to ``tuned/<arch>.json``, see ``Tuned``.
    """

    made_of = "compiled on the machine by numba, torch's CPU operators without it"

    def _tuned(self, request: Request) -> Tuned | None:
        tuned = find_tuned("quantport_cpu", self.name, request)
        compiled = tuned.table.get("compiled") if tuned else None
        if compiled is not None and not request.device.simulated and compiled is bool(why_unavailable()):
            return None  # measured with compiled kernels, which this machine lacks, or without them
        return tuned

    def speed(self, request: Request) -> float | None:
        """The measured speed, relative to prepacked BF16."""
        tuned = self._tuned(request)
        return tuned.speed(request) if tuned else None

    def claim(self, request: Request) -> Claim:
        """``measured`` with device, date, commit and error where it was; else ``declared``."""
        tuned = self._tuned(request)
        if tuned is None:
            return Claim(Evidence.DECLARED, f"{self.made_of}; not yet measured on this architecture")
        results = f"benchmarks/results/linear-{request.device.arch.name}.md"
        return tuned.claim(results, ", with numba" if tuned.table.get("compiled") else "")


class CpuStacked(GroupedKernel, CpuKernel):
    """A kernel that multiplies one group after another, by weights that lie in one stack.

    A compiled graph checks and passes each of its tensors at every call: a few stacks, and not the tensors of
    every expert.
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
        return loop_over_groups(
            lambda rows, packed, part: self.run(rows, packed, part, spec),
            x,
            offsets.tolist(),
            lambda g, j: self.expert_view(stack, g, j),
            bias,
            spec.n,
            shared,
        )


def is_plain(packed: Packed) -> bool:
    """Whether these are plain tensors with memory of their own here."""
    return all(type(t) is Tensor and t.is_cpu for t in packed)


def result_dtype(dtype: torch.dtype, bias: Tensor | None) -> torch.dtype:
    """In what compiled code stores products for activations of a dtype: as asked, or in fp32 where more is
    done with them.
    """
    return torch.bfloat16 if bias is None and dtype is torch.bfloat16 else torch.float32


def with_bias(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Products and a bias in the dtype of the activations."""
    return (y if bias is None else y.add_(bias)).to(dtype)


class CpuGrouped(CpuStacked):
    """A kernel with compiled code that multiplies all small groups, gate and up together, in one launch."""

    def small_group_rows(self, spec: WeightSpec) -> int:
        """The most rows of a group that the compiled code takes; 0 where it cannot run."""
        return 0

    @abstractmethod
    def run_small_groups(
        self, x: Tensor, groups: Sequence[RowRange], stack: Packed, spec: WeightSpec, shared: int
    ) -> Tensor:
        """``run_grouped`` without bias for groups that cover all rows of ``x``."""

    @abstractmethod
    def run_one(self, token: Token, gate_up: Packed, down: Packed, spec: WeightSpec) -> Tensor:
        """The experts of one token by compiled code; the scheme is that of ``spec``."""

    def run_token(
        self,
        x: Tensor,
        experts: Sequence[int],
        weights: Tensor,
        gate_up: Packed,
        down: Packed,
        specs: tuple[WeightSpec, WeightSpec],
        activation: str,
    ) -> Tensor | None:
        if x.dtype is not torch.bfloat16 or weights.dtype is not torch.bfloat16:
            return None
        if specs[0].scheme != specs[1].scheme or not all(map(self.small_group_rows, specs)):
            return None
        from quantport_cpu.jit.token_batch import Token

        token = Token(x.contiguous(), experts, weights.contiguous(), specs[0].n, activation)
        return self.run_one(token, gate_up, down, specs[0])

    def run_grouped(
        self,
        x: Tensor,
        offsets: Tensor,
        stack: Packed,
        bias: Tensor | None,
        spec: WeightSpec,
        shared: int = 1,
    ) -> Tensor:
        bounds, limit = offsets.tolist(), self.small_group_rows(spec)
        groups = [RowRange(g, a, b) for g, (a, b) in enumerate(pairwise(bounds)) if 0 < b - a <= limit]
        if not groups or bias is not None:
            return super().run_grouped(x, offsets, stack, bias, spec, shared)
        count = sum(b - a for _, a, b in groups)
        if count == x.shape[0]:
            return self.run_small_groups(x, groups, stack, spec, shared)
        rows = torch.cat([torch.arange(a, b, dtype=torch.int64, device=x.device) for _, a, b in groups])
        starts = accumulate((b - a for _, a, b in groups), initial=0)
        moved = [RowRange(g, start, start + b - a) for (g, a, b), start in zip(groups, starts, strict=False)]
        out = x.new_empty(x.shape[0], shared * spec.n)
        out[rows] = self.run_small_groups(x[rows], moved, stack, spec, shared)
        for g, (a, b) in enumerate(pairwise(bounds)):
            for j in range(shared if b - a > limit else 0):
                weight = self.expert_view(stack, g, j)
                out[a:b, j * spec.n : (j + 1) * spec.n] = self.run(x[a:b], weight, None, spec)
        return out


def jobs_of(groups: Sequence[RowRange], shared: int, columns: int) -> list[Job]:
    """The jobs of the compiled code over a stack ``[groups, shared, ...]``.

    Args:
        groups: The groups.
        shared: Weights of each.
        columns: Columns of the result of one weight.
    """
    return [Job(g.start, g.stop, shared * g.group + j, j * columns) for g in groups for j in range(shared)]
