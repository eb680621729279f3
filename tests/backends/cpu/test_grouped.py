"""Small groups of rows in one launch: what the compiled code gives is what the loop over groups gives."""

from __future__ import annotations

import pytest
import torch

from quantport import numerics
from quantport.kernels.base import Request, WeightSpec
from quantport.kernels.grouped import loop_over_groups
from quantport.modules import QuantExperts
from quantport.plugins.registry import default_registry
from quantport_cpu.kernels import blocks, fp8, gguf, int4, int8
from quantport_cpu.kernels.base import CpuGrouped, RowRange, jobs_and_weights, scales_by_row

COUNTS = (1, 0, 2, 3, 7, 8, 13, 0, 70)
CASES = [
    (int8.CpuInt8(), "int8"),
    (int8.CpuInt8WeightOnly(), "int8_weight_only"),
    (fp8.CpuFp8WeightOnly(), "fp8_weight_only"),
    (fp8.CpuFp8WeightOnly(), "fp8_per_tensor"),
    (fp8.CpuFp8WeightOnly(), "fp8_per_block"),
    (int4.CpuInt4(), "int4_weight_only"),
    (int4.CpuInt4(), "int4_mse"),
    (int4.CpuInt4Int8(), "int4_w4a8"),
]


@pytest.mark.parametrize(("kernel", "name"), CASES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("shape", [(96, 256), (100, 200), (129, 33), (1, 64)], ids=str)
def test_one_launch_equals_the_loop(kernel, name, shape, monkeypatch):
    spec = WeightSpec(default_registry().schemes[name], *shape)
    request = Request(spec, "moe", default_registry().device("cpu"))
    if kernel.reasons_against(request) or not kernel.small_group_rows(spec):
        pytest.skip("no compiled code for it here")
    torch.manual_seed(0)
    packed = [
        kernel.pack(numerics.quantize_weight((torch.randn(shape) * 0.02).bfloat16(), spec.scheme), spec)
        for _ in range(18)
    ]
    launched, run = [], type(kernel).run_small_groups
    monkeypatch.setattr(
        type(kernel), "run_small_groups", lambda self, *args: launched.append(args) or run(self, *args)
    )
    for groups in (9, 4, 1):
        offsets = torch.tensor((0, *COUNTS[:groups])).cumsum(0).int()
        x = torch.randn(int(offsets[-1]), spec.k).bfloat16()
        for shared in (1, 2):
            stack = kernel.prepare_grouped(packed[: groups * shared], shared)
            found = kernel.run_grouped(x, offsets, stack, None, spec, shared)
            expected = loop_over_groups(
                lambda rows, weight, bias: kernel.run(rows, weight, bias, spec),
                x,
                offsets.tolist(),
                lambda g, j, shared=shared: packed[shared * g + j],
                None,
                spec.n,
                shared,
            )
            assert found.shape == expected.shape
            assert found.dtype == x.dtype
            assert (
                found.float() - expected.float()
            ).abs().max() <= kernel.tolerance * expected.float().abs().max()
    assert len(launched) == 6


def test_without_compiled_code_it_is_the_loop(monkeypatch):
    monkeypatch.setattr(int8, "why_unavailable", lambda: "off")
    monkeypatch.setattr(CpuGrouped, "run_small_groups", lambda *args: pytest.fail("launched"))
    spec, kernel = WeightSpec(default_registry().schemes["int8"], 32, 64), int8.CpuInt8()
    packed = [numerics.quantize_weight(torch.randn(32, 64).bfloat16(), spec.scheme) for _ in range(2)]
    stack = kernel.prepare_grouped([tuple(p.values()) for p in packed])
    y = kernel.run_grouped(torch.ones(3, 64).bfloat16(), torch.tensor([0, 1, 3]), stack, None, spec)
    assert y.shape == (3, 32)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_dualscale", "nvfp4", "nf4", "fp6", "mxfp8", "q4_0", "q6_k"])
def test_experts_of_block_formats_lie_in_stacks(name):
    """A graph passes a tensor for each that a weight has; no bit differs from experts one by one."""
    scheme, kernel = (
        default_registry().schemes[name],
        (gguf.CpuGguf if name.startswith("q") else blocks.CpuBlocks)(),
    )
    up, down = WeightSpec(scheme, 96, 64), WeightSpec(scheme, 64, 96)
    if kernel.reasons_against(Request(up, "moe", default_registry().device("cpu"))):
        pytest.skip("no compiled code for it here")
    torch.manual_seed(0)
    module, packed = QuantExperts(kernel, up, down, 3, "silu"), {}
    for weight, spec in module.specs.items():
        stored = numerics.quantize_weight(torch.randn(spec.n, spec.k).bfloat16(), scheme)
        packed[weight] = kernel.pack(stored, spec)
        module.set_weight(weight, stored)
    x, routing = torch.randn(3, 64).bfloat16(), torch.ones(3, 1).bfloat16()
    with torch.no_grad():
        y = torch.compile(module, fullgraph=True, backend="aot_eager")(
            x, torch.tensor([[2], [0], [2]]), routing
        )
    assert len(module.operands()[0]) == 2 * len(packed["0.up_proj"])
    for expert, rows in ((0, [1]), (2, [0, 2])):
        gate, rise = (kernel.run(x[rows], packed[f"{expert}.{p}_proj"], None, up) for p in ("gate", "up"))
        between = torch.nn.functional.silu(gate) * rise
        assert torch.equal(y[rows], kernel.run(between, packed[f"{expert}.down_proj"], None, down))


def test_jobs_and_scales():
    groups = [RowRange(3, 0, 1), RowRange(5, 1, 4)]
    assert jobs_and_weights(groups, 2, 10) == (
        [(0, 1, 0, 0), (0, 1, 1, 10), (1, 4, 2, 0), (1, 4, 3, 10)],
        [6, 7, 10, 11],
    )
    scales = torch.arange(12.0).view(6, 2, 1, 1)
    lines = scales_by_row(scales, [6, 7, 10, 11], groups, 2)
    assert lines.tolist() == [[6, 6, 7, 7], *[[10, 10, 11, 11]] * 3]
