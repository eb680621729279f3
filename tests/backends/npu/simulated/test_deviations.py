"""Where the arithmetic of an operator is not that of the scheme, it is exactly what the kernel declares:
tested with weights on which the two differ.
"""

from simulator.need import simulated

simulated()

import pytest
import torch
from declared import DECLARED, Declared
from declared import scheme as numbers

from quantport import numerics
from quantport.backend import Accepted, Request, WeightSpec
from quantport.plugins.registry import default_registry
from quantport.testing import cases

N, K = 48, 200
CLOSE = 2.0**-7  # of one rounding to 16 bits, of another order of sums


KERNELS = {kernel.name: kernel for kernel in default_registry().kernels("npu")}
CASES = [
    (name, scheme)
    for name in DECLARED
    for scheme in default_registry().schemes.values()
    if KERNELS[name].serves(scheme)
]


@pytest.mark.parametrize("name", [name for name, linear in DECLARED.items() if linear is not numbers])
def test_it_is_told_from_the_scheme(name):
    """With one input at a time nothing is summed, so that the bits of a result are those of the declared
    arithmetic and of no other.
    """
    kernel, scheme = (
        KERNELS[name],
        next(s for s in default_registry().schemes.values() if KERNELS[name].serves(s)),
    )
    spec = WeightSpec(scheme, N, K)
    layer = "moe" if "grouped" in name else "linear"
    dtype = default_registry().device("npu").arch.compute
    if not isinstance(
        kernel.verdict(Request(spec, layer, default_registry().device("npu"), dtype)), Accepted
    ):
        pytest.skip(f"{name} does not run on {default_registry().device('npu')}")
    stored_weight = numerics.quantize_weight(cases.plain(N, K), scheme)
    packed = kernel.pack({key: t.to("npu") for key, t in stored_weight.items()}, spec)
    x = (torch.eye(K) * 1.9).to(dtype)
    y = kernel.run(x.to("npu"), packed, None, spec).cpu()
    effective = scheme if kernel.quantizes_activations else scheme.weight_only
    same, plain = (
        (y == linear(x, stored_weight, effective, None, x.dtype)).float().mean()
        for linear in (DECLARED[name], numbers)
    )
    assert same > 0.99
    assert plain < 0.95


def test_every_deviation_is_here():
    assert {name for name, kernel in KERNELS.items() if kernel.numeric_deviation} == set(DECLARED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "scheme"), CASES, ids=[f"{name}-{scheme.name}" for name, scheme in CASES])
def test_it_is_what_is_declared(name, scheme, dtype):
    kernel, device, spec = KERNELS[name], default_registry().device("npu"), WeightSpec(scheme, N, K)
    layer = "moe" if "grouped" in name else "linear"
    if not isinstance(kernel.verdict(Request(spec, layer, device, dtype)), Accepted):
        pytest.skip(f"{name} does not run on {device}")
    x, reference = cases.activations(5, K, dtype), Declared(kernel, kernel)
    for label, make in cases.specials(scheme):
        stored_weight = numerics.quantize_weight(make(N, K), scheme)
        packed = kernel.pack({key: t.to("npu") for key, t in stored_weight.items()}, spec)
        y, expected = kernel.run(x.to("npu"), packed, None, spec).cpu(), reference.run(x, packed, None, spec)
        if torch.isfinite(expected).all():
            assert cases.relative_error(y, expected) <= CLOSE, label
