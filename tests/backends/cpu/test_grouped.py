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
from quantport_cpu.kernels.base import CpuGrouped, RowRange, jobs_of

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


TOKEN_CASES = [*CASES, (int4.CpuInt4(), "int4_weight_only_g32")]


def token_layer(kernel, name, hidden, wide, activation="silu"):
    """Five experts, or a skip."""
    scheme = default_registry().schemes[name]
    up, down = WeightSpec(scheme, wide, hidden), WeightSpec(scheme, hidden, wide)
    if kernel.reasons_against(Request(up, "moe", default_registry().device("cpu"))):
        pytest.skip("no compiled code for it here")
    if not kernel.small_group_rows(up):
        pytest.skip("no compiled code for it here")
    torch.manual_seed(0)
    module = QuantExperts(kernel, up, down, 5, activation)
    for weight, spec in module.specs.items():
        module.set_weight(
            weight, numerics.quantize_weight((torch.randn(spec.n, spec.k) * 0.1).bfloat16(), scheme)
        )
    return module


def by_launches(module, monkeypatch, *given):
    """What the layer gives without the launch for a token."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(CpuGrouped, "run_token", lambda *_: None)
        return module(*given)


@pytest.mark.parametrize(("kernel", "name"), TOKEN_CASES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("shape", [(64, 32), (640, 352), (272, 160)], ids=str)
def test_a_token_in_one_launch_is_what_several_make_of_it(kernel, name, shape, monkeypatch):
    """To the bit, by any number of threads."""
    module, before = token_layer(kernel, name, *shape), torch.get_num_threads()
    index, weights = torch.tensor([[3, 0, 4]]), torch.tensor([[0.5, 0.3, 0.2]]).bfloat16()
    launched, run = [], type(kernel).run_one
    monkeypatch.setattr(
        type(kernel), "run_one", lambda self, *args: launched.append(args) or run(self, *args)
    )
    monkeypatch.setattr("quantport_cpu.jit.token_batch.threads_for", lambda _: torch.get_num_threads())
    for i, threads in enumerate((1, 2, 5)):
        x = torch.randn(1, shape[0]).bfloat16() * 3**i
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                found = [module(x, index, weights) for _ in range(5)]
        finally:
            torch.set_num_threads(before)
        expected = by_launches(module, monkeypatch, x, index, weights)
        assert expected.abs().max() > 0
        assert all(torch.equal(y, expected) for y in found)
    assert len(launched) == 15


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_of_a_token_are_those_of_torch(activation, monkeypatch):
    """Odd sizes: the last columns of a row, which torch computes one by one, may be rounded otherwise."""
    module = token_layer(int8.CpuInt8(), "int8", 33, 75, activation)
    x, index, weights = torch.randn(1, 33).bfloat16(), torch.tensor([[1, 2]]), torch.ones(1, 2).bfloat16()
    with torch.no_grad():
        y = module(x, index, weights)
    torch.testing.assert_close(y, by_launches(module, monkeypatch, x, index, weights), rtol=2**-7, atol=1e-3)


def test_what_is_no_single_token_of_bf16_goes_the_usual_way(monkeypatch):
    module = token_layer(int8.CpuInt8(), "int8", 64, 32)
    monkeypatch.setattr(int8.CpuInt8, "run_one", lambda *_: pytest.fail("launched"))
    x, index, weights = torch.randn(1, 64).bfloat16(), torch.tensor([[1, 2]]), torch.ones(1, 2).bfloat16()
    nowhere = torch.tensor([[1, -1]])
    with torch.no_grad():
        one = module(x, index[:, :1], weights[:, :1].float())
        assert torch.equal(module(x, nowhere, weights).float(), one.float())
        assert module(x.float(), index, weights).dtype is torch.float32
        assert module(x.expand(2, -1), index.expand(2, -1), weights.expand(2, -1)).shape == (2, 64)
        assert module(x, index[:, :0], weights[:, :0]).abs().max() == 0
    y = x.clone().requires_grad_()
    module(y, index, weights).sum().backward()
    assert y.grad.abs().max() > 0


def test_jobs_of_groups():
    assert jobs_of([RowRange(3, 0, 1), RowRange(5, 1, 4)], 2, 10) == [
        (0, 1, 6, 0),
        (0, 1, 7, 10),
        (1, 4, 10, 0),
        (1, 4, 11, 10),
    ]
