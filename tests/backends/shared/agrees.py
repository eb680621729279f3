"""Checks that the tests of several rooms share, of a kernel whose device is not here or of a quantizer."""

from __future__ import annotations

import torch

from quantport import numerics
from quantport.backend import WeightSpec
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases


def packing_loses_nothing(kernel, scheme, shapes):
    """Packing is inverted exactly for every shape, and zero rows give zero rows."""
    for n, k in shapes:
        spec = WeightSpec(BUILTIN[scheme], n, k)
        stored = numerics.quantize_weight(cases.random(n, k), spec.scheme)
        packed = kernel.pack({name: t.clone() for name, t in stored.items()}, spec)
        same(kernel.unpack(packed, spec), stored)
        assert kernel.run(torch.empty(0, k, dtype=torch.bfloat16), packed, None, spec).shape == (0, n)


def quantizes_as_the_reference(quantize, weight, scheme):
    """A room's ``quantize_weight`` accepts the weight and returns the bytes of the reference."""
    assert quantize(weight, BUILTIN[scheme]) is not None
    fast = numerics.quantize_weight(weight, BUILTIN[scheme], fast=quantize)
    same(fast, numerics.quantize_weight(weight, BUILTIN[scheme]))


def same(found, wanted):
    """The same tensors, bit for bit."""
    assert list(found) == list(wanted)
    assert all(cases.same_bits(found[name], wanted[name]) for name in wanted)
