"""Toy backends: one that is right, and one for each way of being wrong that the conformance suite must catch."""

from __future__ import annotations

import torch

from quantport.backend import Arch, Backend, Claim, Device, Evidence, Kernel, Rejected, numerics
from quantport.catalog import BUILTIN
from quantport.host import Host
from quantport.testing import Subject
from quantport.testing.subject import alone

ARCH = Arch("toy", "box", "a toy in a box", frozenset({"int8"}), "the manual of the toy")
SCHEME = BUILTIN["int8"]


class Toy(Kernel):
    """Right: int8 with per-token activations, even N only, since it says so and raises otherwise."""

    name = "toy.int8"
    quantizes_activations = True

    def serves(self, scheme):
        return scheme.name == "int8"

    def reasons_against(self, request):
        return ("N must be even",) if request.weight.n % 2 else ()

    def claim(self, request):
        return Claim(Evidence.DECLARED, "the manual of the toy")

    def run(self, x, packed, bias, spec):
        if spec.n % 2:
            raise RuntimeError("N must be even")
        return numerics.linear(x, self.unpack(packed, spec), spec.scheme, bias)


class ToyBackend(Backend):
    kind = "toy"
    torch_type = "cpu"
    archs = {"box": ARCH}  # noqa: RUF012

    def __init__(self, *kernels, **overrides):
        self._kernels = kernels or (Toy(),)
        vars(self).update(overrides)

    def detect(self):
        return (Device(ARCH),)

    def kernels(self):
        return self._kernels


def subject(*kernels, policy=None, **overrides) -> Subject:
    """A subject with a toy backend of these kernels."""
    hosted: Host = alone(ToyBackend(*kernels, **overrides))
    return Subject(hosted, "toy", policy or {})


class WrongScale(Toy):
    def run(self, x, packed, bias, spec):
        return super().run(x, packed, bias, spec) * 1.05


class WrongRow(Toy):
    """Only the last of many rows is wrong, as a tile that ends too early would make it."""

    def run(self, x, packed, bias, spec):
        y = super().run(x, packed, bias, spec)
        if len(y) > 64:
            y[-1] = 0
        return y


class AcceptsWhatRaises(Toy):
    def reasons_against(self, request):
        return ()


class WrongDtype(Toy):
    def run(self, x, packed, bias, spec):
        return super().run(x, packed, bias, spec).float()


class ForgetsBias(Toy):
    def run(self, x, packed, bias, spec):
        return super().run(x, packed, None, spec)


class WritesActivations(Toy):
    def run(self, x, packed, bias, spec):
        y = super().run(x, packed, bias, spec)
        x.zero_()
        return y


class RefusesWhatWorks(Toy):
    def reasons_against(self, request):
        return ("N must be even",) if request.weight.n % 2 else ("it is Monday",) if request.weight.k == 256 else ()


class LosesBits(Toy):
    def pack(self, canonical, spec):
        return canonical["weight"] & -2, canonical["weight_scale"]


class LosesScaleShape(Toy):
    def unpack(self, packed, spec):
        return {"weight": packed[0], "weight_scale": packed[1].view(-1)}


class RaisesInReasons(Toy):
    def reasons_against(self, request):
        raise KeyError("box")


class NoReasons(Toy):
    def verdict(self, request):
        return Rejected(self.name, ())


class EmptyReason(Toy):
    def reasons_against(self, request):
        return ("",)


class NoSource(Toy):
    def claim(self, request):
        return Claim(Evidence.DECLARED, " ")


class MeasuredNowhere(Toy):
    def claim(self, request):
        return Claim(Evidence.MEASURED, "we did")


class Careless(Toy):
    tolerance = 1.0


class KnowsOneArch(Toy):
    """Answers another architecture's question with an exception."""

    def reasons_against(self, request):
        return {"box": ()}[request.device.arch.name]


def raising_detect():
    raise OSError("no driver")


BF16 = torch.bfloat16
