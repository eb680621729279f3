"""The budget counts what quantizing one weight allocates on the device, measured by the allocator of
torch_npu.
"""

from simulator.need import simulated

simulated("A2", "950")

import pytest
import torch

from quantport import numerics
from quantport.backend import WeightSpec
from quantport.planning.memory import peak_bytes
from quantport.plugins.registry import default_registry
from quantport.testing import cases

SHAPES = ((768, 256), (512, 512), (1024, 1024))  # narrower than a block of 512; as wide; more than one chunk
SCHEMES = [
    *default_registry().schemes.values(),
    *(default_registry().schemes[name] for name in ("mxfp8:mse", "mxfp4_weight_only:mse:hadamard")),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_weight_holds_no_more_than_it_needs(scheme):
    for n, k in SHAPES:
        torch.npu.empty_cache()
        before = torch.npu.memory_allocated()
        weight = cases.plain(n, k).to("npu")
        torch.npu.reset_peak_memory_stats()
        stored = numerics.quantize_weight(weight, scheme)
        assert torch.npu.max_memory_allocated() - before <= peak_bytes(WeightSpec(scheme, n, k), weight.dtype)
        assert stored
