"""What the tests of several rooms ask of a kernel that has no device here, or of a quantizer."""

from __future__ import annotations

import torch

from quantport import numerics
from quantport.backend import WeightSpec
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases


def packing_loses_nothing(kernel, scheme, shapes):
    """For every shape, and no rows give no rows."""
    for n, k in shapes:
        spec = WeightSpec(BUILTIN[scheme], n, k)
        stored = numerics.quantize_weight(cases.random(n, k), spec.scheme)
        packed = kernel.pack({name: t.clone() for name, t in stored.items()}, spec)
        same(kernel.unpack(packed, spec), stored)
        assert kernel.run(torch.empty(0, k, dtype=torch.bfloat16), packed, None, spec).shape == (0, n)


def quantizes_as_the_reference(quantize, weight, scheme):
    """A room's ``quantize_weight`` takes the weight, and gives the bytes of the reference."""
    assert quantize(weight, BUILTIN[scheme]) is not None
    fast = numerics.quantize_weight(weight, BUILTIN[scheme], fast=quantize)
    same(fast, numerics.quantize_weight(weight, BUILTIN[scheme]))


def same(found, wanted):
    """The same tensors, to the bit."""
    assert list(found) == list(wanted)
    assert all(cases.same_bits(found[name], wanted[name]) for name in wanted)
