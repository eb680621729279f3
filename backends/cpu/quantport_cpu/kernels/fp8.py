"""e4m3fn weights with 16-bit activations: the exact bit trick, in row blocks that stay in cache.

``((int16)byte << 7) & 0xBFFF`` read as fp16 is the e4m3fn value / 256, exactly, subnormals included: the
exponent moves from bias 7 to bias 15. ATen's own conversion is scalar, and its fp8 matmul a reference loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantport.backend import Packed, Reason, Request, Scheme, WeightSpec
from quantport_cpu.jit import available
from quantport_cpu.kernels.base import COMPILED, TINY, CpuGrouped, Few, by_few, by_group, jobs_of, some
from quantport_cpu.kernels.scratch import scratch

_ROWS = 256
_FEW = 4  # up to this many rows, and without it, fp16 matrix-vector products beat an fp32 matmul


def _halves(codes: Tensor) -> Tensor:
    """int8 view of e4m3fn ``[R, K]`` to fp16 ``[R, K]`` in scratch, value / 256."""
    out = scratch(codes, torch.int16, *codes.shape)
    return out.copy_(codes).mul_(128).bitwise_and_(~0x4000).view(torch.float16)


class CpuFp8WeightOnly(CpuGrouped):
    """W8A16 for every e4m3fn weight: per tensor, per channel, per 128x128 block."""

    name = "cpu.fp8_weight_only"
    tolerance = 2.0**-7

    def serves(self, scheme: Scheme) -> bool:
        quant = scheme.weight
        blocks = quant.block_shape in ((0, 0), (1, 0), (128, 128))
        return quant.format == "e4m3fn" and quant.plain and quant.scale == "fp32" and blocks

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        return ()

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, spec: WeightSpec) -> Tensor:
        codes, scale = packed
        blocks, rows = spec.scheme.weight.group_size, x.shape[0]
        if 0 < rows <= COMPILED and not available():
            from quantport_cpu.jit import gemv

            y = by_few(x, lambda part: gemv.fp8(part, codes, scale if blocks else None))
        elif not blocks and rows <= _FEW:
            y = self._few(x.float(), codes.view(torch.int8))
        else:
            y = self._many(x.float(), codes.view(torch.int8), scale, blocks)
        if not blocks:
            y.mul_(scale.view(-1))
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def limit(self, spec: WeightSpec) -> int:
        return 0 if available() else COMPILED

    def few(self, x: Tensor, groups: Sequence[Few], stack: Packed, spec: WeightSpec, shared: int) -> Tensor:
        from quantport_cpu.jit import grouped

        jobs, used = jobs_of(groups, shared, spec.n)
        blocks = spec.scheme.weight.group_size
        codes, scales = some(stack[0], used), some(stack[1], used) if blocks else None
        y = grouped.fp8(x, [grouped.Job(*j) for j in jobs], codes, scales, shared * spec.n)
        return y if blocks else y.mul_(by_group(stack[1], used, groups, spec.n))

    def _few(self, x: Tensor, codes: Tensor) -> Tensor:
        """Rows scaled into fp16 by a power of two, which is exact for all but the tiniest elements of
        a row.
        """
        n = codes.shape[0]
        out = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
        exponent = torch.frexp(x.abs().amax(-1, keepdim=True).clamp_min_(TINY))[1].float()
        half = torch.ldexp(x, -exponent).half()
        for r in range(0, n, _ROWS):
            weight = _halves(codes[r : r + _ROWS])
            for m in range(x.shape[0]):
                out[m, r : r + _ROWS] = torch.mv(weight, half[m])
        return torch.ldexp(out, exponent + 8)

    def _many(self, x: Tensor, codes: Tensor, scale: Tensor, blocks: int) -> Tensor:
        """Row blocks as fp32, with the scales of 128x128 blocks multiplied in, and one matmul for each."""
        n, k = codes.shape
        out = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
        for r in range(0, n, _ROWS):
            half = _halves(codes[r : r + _ROWS])
            weight = scratch(codes, torch.float32, *half.shape).copy_(half)
            if blocks:
                rows = scale[r // blocks : (r + half.shape[0] + blocks - 1) // blocks]
                wide = rows.repeat_interleave(blocks, 1)[:, :k]
                for i, row in enumerate(wide):
                    weight[i * blocks : (i + 1) * blocks].mul_(row)
            out[:, r : r + _ROWS] = torch.mm(x, weight.t())
        return out.mul_(256)
