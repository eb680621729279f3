"""int8 with scales for groups, and with offsets, beside the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantport import numerics
from quantport.kernels.base import WeightSpec
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN
from quantport_cpu import jit
from quantport_cpu.kernels.base import compiled_max_rows
from quantport_cpu.kernels.int8_groups import CpuInt8Groups

OPTIONS = [
    "g128",
    "g64",
    "g32",
    "g128:fp16",
    "g64:bf16",
    "channel:fp16",
    "g128:asym",
    "g64:fp16:asym",
    "g32:asym",
]
SCHEMES = [default_registry().schemes[f"int8_weight_only:{option}"] for option in (*OPTIONS, "channel:asym")]
SHAPES = [(1, 64), (37, 300), (130, 1100)]
ROWS = [0, 1, 3, 9, compiled_max_rows() + 1]


def stored(scheme, n: int, k: int) -> dict[str, Tensor]:
    """Random codes, and scales and offsets of 16 bits, in the dtypes of the layout."""
    torch.manual_seed(n * k)
    out = {}
    for key, (shape, dtype) in scheme.layout(n, k).items():
        values = torch.randint(-128, 128, shape) if key == "weight" else torch.randn(shape).half() / 64
        out[key] = values.to(dtype)
    return out


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_products_are_those_of_the_reference(scheme, shape, m):
    kernel, spec = CpuInt8Groups(), WeightSpec(scheme, *shape)
    weight = stored(scheme, *shape)
    packed = kernel.pack(weight, spec)
    for dtype in (torch.bfloat16, torch.float32):
        x, bias = torch.randn(m, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        for added in (None, bias):
            want = numerics.linear(
                x.float(), weight, scheme.weight_only, None if added is None else added.float()
            )
            got = kernel.run(x, packed, added, spec)
            assert got.dtype is dtype
            error = (got.float() - want).norm() / want.norm().clamp_min(1e-30)
            assert error < (2.0**-7 if dtype is torch.bfloat16 else 2.0**-18)


@pytest.mark.skipif(bool(jit.why_unavailable()), reason="no compiled code")
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_few_rows_are_multiplied_by_compiled_code(scheme, monkeypatch):
    by_panels = "quantport_cpu.kernels.int8_groups._by_panels"
    monkeypatch.setattr(by_panels, lambda x, packed, spec: torch.full((len(x), spec.n), 7.0))
    kernel, spec = CpuInt8Groups(), WeightSpec(scheme, 8, 256)
    packed = kernel.pack(stored(scheme, 8, 256), spec)
    for dtype in (torch.bfloat16, torch.float32):
        got = kernel.run(torch.ones(1, 256, dtype=dtype), packed, None, spec)
        cancels = scheme.weight.zero_point and dtype is torch.float32  # all of the sums but their rounding
        assert bool((got == 7).all()) is bool(scheme.weight.group_size == 32 or cancels)


def test_what_it_serves():
    served = {s.name for s in (*SCHEMES, *BUILTIN.values()) if CpuInt8Groups().serves(s)}
    assert served == {s.name for s in SCHEMES}
