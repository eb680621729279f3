"""Toy backends: one that is right, and one for each way of being wrong that the conformance suite
must catch.
"""

from __future__ import annotations

import os
import time

import torch
from torch._subclasses.fake_tensor import FakeTensor

from quantport.backend import (
    Arch,
    Backend,
    Claim,
    Device,
    Evidence,
    Kernel,
    MachineCode,
    Measurement,
    Reason,
    Refusal,
    Rejected,
    numerics,
)
from quantport.plugins.registry import Registry
from quantport.scheme.catalog import BUILTIN
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
        return (Reason("N must be even"),) if request.weight.n % 2 else ()

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


def subject(*kernels, limit=60.0, **overrides) -> Subject:
    """A subject with a toy backend of these kernels."""
    registry: Registry = alone(ToyBackend(*kernels, **overrides))
    return Subject(registry, "toy", limit=limit)


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


class LeavesTransposed(Toy):
    """The weight of a square layer lies the other way round: no shape tells."""

    def run(self, x, packed, bias, spec):
        return super().run(
            x, (packed[0].t().contiguous(), packed[1]) if spec.n == spec.k else packed, bias, spec
        )


class RefusesWhatWorks(Toy):
    """``kind`` is how it calls that."""

    kind = Refusal.IMPOSSIBLE

    def reasons_against(self, request):
        if request.weight.n % 2:
            return (Reason("N must be even"),)
        return (Reason("it is Monday", self.kind),) if request.weight.k == 256 else ()


class RefusesTooMuch(Toy):
    """It says multiples of 32, of K, where 16 do."""

    def reasons_against(self, request):
        return (
            (Reason("K must be a multiple of 32"),)
            if request.weight.k % 32
            else super().reasons_against(request)
        )

    def run(self, x, packed, bias, spec):
        if spec.k % 16:
            raise RuntimeError("K must be a multiple of 16")
        return super().run(x, packed, bias, spec)


class RefusesHalf(Toy):
    """It says multiples of 16, of N, where 8 do."""

    def reasons_against(self, request):
        return (Reason("N must be a multiple of 16"),) if request.weight.n % 16 else ()

    def run(self, x, packed, bias, spec):
        if spec.n % 8:
            raise RuntimeError("N must be a multiple of 8")
        return numerics.linear(x, self.unpack(packed, spec), spec.scheme, bias)


class Crashes(Toy):
    """What it rightly refuses ends the process; then it refuses what works."""

    def reasons_against(self, request):
        return super().reasons_against(request) or (
            (Reason("it is Monday"),) if request.weight.k == 272 else ()
        )

    def run(self, x, packed, bias, spec):
        if spec.n % 2:
            os.abort()
        return super().run(x, packed, bias, spec)


class Aborts(Crashes):
    """It refuses nothing else."""

    def reasons_against(self, request):
        return Toy.reasons_against(self, request)


class Hangs(Toy):
    def run(self, x, packed, bias, spec):
        if spec.n % 2:
            time.sleep(600)
        return super().run(x, packed, bias, spec)


class LosesBits(Toy):
    def pack(self, stored_weight, spec):
        return stored_weight["weight"] & -2, stored_weight["weight_scale"]


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
        return (Reason(""),)


class TextReasons(Toy):
    """Written for texts."""

    def reasons_against(self, request):
        return ("N must be even",)


class NoKind(Toy):
    def reasons_against(self, request):
        return (Reason("N must be even", "impossible"),)


class NoSource(Toy):
    def claim(self, request):
        return Claim(Evidence.DECLARED, " ")


RESULTS = Measurement("tests/house/toy_results.json", "a toy in a box", "2026-11-29", "1a2b3c4")
CODE = MachineCode("tests/house/toy_results.json", "toycc", "3.1", "TMMA.16x16")


class Claims(Toy):
    """Evidence of its own."""

    def __init__(self, evidence, proof=None):
        self.evidence, self.proof = evidence, proof

    def claim(self, request):
        return Claim(self.evidence, "we did", self.proof)


class Careless(Toy):
    tolerance = 1.0


class KnowsOneArch(Toy):
    """Answers another architecture's question with an exception."""

    def reasons_against(self, request):
        return {"box": ()}[request.device.arch.name]


class WrongFake(Toy):
    """Right, but for what it tells of shapes where nothing is computed."""

    def run(self, x, packed, bias, spec):
        y = super().run(x, packed, bias, spec)
        return y.new_empty(len(y), spec.n + 1) if isinstance(y, FakeTensor) else y


class HangingBackend(ToyBackend):
    """Its driver does not answer."""

    def detect(self):
        time.sleep(600)
        return ()


def raising_detect():
    raise OSError("no driver")


BF16 = torch.bfloat16
