"""Packing of the rooms is the same under every default dtype and device of the process, wherever it runs
without the device.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from quantport import numerics
from quantport.backend import WeightSpec, aten
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases
from quantport_triton.kernels import weights

ROOMS = ("cuda", "rocm", "xpu", "npu")
N, K = 64, 256


def packed(kernel, scheme):
    """Packed tensors, and those that come back; None where an operator of the vendor is needed."""
    spec, out = WeightSpec(BUILTIN[scheme], N, K), []
    for size in (1, 1e-30):  # powers beyond what fp16 holds, too
        stored = numerics.quantize_weight(cases.plain(N, K) * size, spec.scheme)
        try:
            held = kernel.pack({name: t.clone() for name, t in stored.items()}, spec)
            out += [*held, *kernel.unpack(held, spec).values()]
        except (AttributeError, ImportError, NotImplementedError, RuntimeError):
            return None
    return out


@cache
def here(room):
    """(kernel, scheme, what it packs) for each kernel of a room that packs without its device."""
    shared = {type(kernel) for kernel in aten.portable()}  # they keep tensors as they are
    served = [
        (k, s.name)
        for k in default_registry().kernels(room)
        if type(k) not in shared
        for s in BUILTIN.values()
        if k.serves(s)
    ]
    return [(kernel, scheme, out) for kernel, scheme in served if (out := packed(kernel, scheme)) is not None]


@pytest.fixture(params=[(torch.float16, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "meta")], ids=str)
def defaults(request):
    before = torch.get_default_dtype()
    for room in ROOMS:
        here(room)
    torch.set_default_dtype(request.param[0])
    with torch.device(request.param[1]):
        yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("room", ROOMS)
def test_packing(room, defaults):
    assert here(room)
    for kernel, scheme, expected in here(room):
        found = packed(kernel, scheme)
        assert found is not None, f"{kernel.name} with {scheme} does not pack any more"
        assert all(cases.same_bits(a, b) for a, b in zip(found, expected, strict=True)), (
            f"{kernel.name} with {scheme}"
        )


def test_the_table_of_triton(defaults):
    table = weights._table_on("nf4", torch.device("cpu"))
    assert (table.dtype, table.device.type, table.shape) == (torch.float32, "cpu", (272,))
    assert table is weights._table_on("nf4", torch.device("cpu"))
