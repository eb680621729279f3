"""Weights with more output channels than one product takes, and weights in FRACTAL_NZ."""

from simulator.need import simulated

simulated()

import pytest
import torch
from declared import Declared
from simulator.memory import NZ, layout

from quantport import numerics
from quantport.backend import Accepted, Request, WeightSpec
from quantport.plugins.registry import default_registry
from quantport.testing import cases
from quantport_npu.kernels.base import PART, NpuKernel
from quantport_npu.vendor import LIMIT

N, K = PART + 200, 64  # a second part that is no whole block


def takes():
    """Every kernel with one scheme and the widest weight that it takes here."""
    for kernel in (k for k in default_registry().kernels("npu") if isinstance(k, NpuKernel)):
        for scheme in (s for s in default_registry().schemes.values() if kernel.serves(s)):
            specs = [
                WeightSpec(scheme, n, 256 if scheme.weight.group_size > 32 else K) for n in (N, LIMIT - 7)
            ]
            asked = [
                Request(s, "linear", default_registry().device("npu"), t)
                for s in specs
                for t in (torch.bfloat16, torch.float16)
            ]
            if request := next((r for r in asked if isinstance(kernel.verdict(r), Accepted)), None):
                yield kernel, request.weight, request.dtype
                break


TAKES = list(takes())


def test_there_are_some():
    assert {k.name: s.n for k, s, _ in TAKES}["npu.weight_quant_int8"] == N
    assert all(s.n < N for k, s, _ in TAKES if "int4" in k.name or "dual" in k.name)


@pytest.mark.parametrize(("kernel", "spec", "dtype"), TAKES, ids=[k.name for k, _, _ in TAKES])
def test_several_products_are_right(kernel, spec, dtype):
    weight = cases.plain(spec.n, spec.k)
    weight *= torch.arange(1, spec.n + 1)[:, None] / spec.n + 0.5  # the scales of no two parts are alike
    stored_weight = numerics.quantize_weight(weight, spec.scheme)
    packed = kernel.pack({key: t.to("npu") for key, t in stored_weight.items()}, spec)
    x, bias = cases.activations(3, spec.k, dtype), cases.bias(spec.n, dtype)
    y = kernel.run(x.to("npu"), packed, bias.to("npu"), spec).cpu()
    expected = Declared(kernel, kernel).run(x, packed, bias, spec)
    assert (y.float() - expected.float()).abs().max() <= kernel.tolerance * expected.float().abs().max()
    for part in (slice(0, 128), slice(PART, spec.n)):  # an error in few channels would not show among all
        assert cases.relative_error(y[:, part], expected[:, part]) <= kernel.tolerance
    back = kernel.unpack(packed, spec)
    assert all(cases.same_bits(back[key].cpu(), t) for key, t in stored_weight.items())


@pytest.mark.parametrize(
    ("name", "scheme"), [("npu.quant_matmul", "int8"), ("npu.dual_level_quant_matmul", "mxfp4_dualscale")]
)
def test_weights_lie_in_tiles(name, scheme):
    """By default torch_npu allows no internal formats, and then returns a row-major matrix on A2 and A3."""
    kernel, spec = (
        next(k for k in default_registry().kernels("npu") if k.name == name),
        WeightSpec(default_registry().schemes[scheme], 64, 512),
    )
    if not isinstance(kernel.verdict(Request(spec, "linear", default_registry().device("npu"))), Accepted):
        pytest.skip(f"{name} does not run on {default_registry().device('npu')}")
    stored_weight = numerics.quantize_weight(cases.plain(64, 512), spec.scheme)
    packed = kernel.pack({key: t.to("npu") for key, t in stored_weight.items()}, spec)
    assert NZ in [layout(t) for t in packed]


@pytest.mark.parametrize("scheme", ["int8", "int8_weight_only", "fp8", "mxfp8", "mxfp4", "int4_weight_only"])
def test_gate_and_up_together_have_the_limit_too(scheme):
    device = default_registry().device("npu")
    grouped = [k for k in default_registry().kernels("npu") if "grouped" in k.name]

    def taken(n):
        request = Request(WeightSpec(default_registry().schemes[scheme], n, 256), "moe", device)
        return any(isinstance(k.verdict(request), Accepted) for k in grouped)

    assert taken(32760) == taken(64)
    assert not taken(32768)
