"""A checkpoint of codes, whatever its format: what is kept, what is decoded, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from core_models import Moe, made, same_bits
from test_checkpoint_formats import Memory, knowing
from torch import nn

import quantport
from quantport import numerics
from quantport.checkpoint import CheckpointFormat, Coded, CodedTensor
from quantport.errors import CheckpointError
from quantport.loading.load_model import prepared
from quantport.modules import QuantModule
from quantport.scheme.catalog import BUILTIN

INT8 = BUILTIN["int8_weight_only"]


class Reader(nn.Linear):
    """A layer whose class is not that of a linear layer."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 64, bias=False)
        self.read = Reader(64, 32, bias=False)
        self.moe = Moe()
        self.b = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return self.b(self.moe(self.read(self.a(x))))


class Toy(CheckpointFormat):
    """int8 codes ``*.toy`` and scales ``*.toy_scale``; a weight without a scheme has ``*.toy_shift`` too."""

    name = "toy"

    def recognize(self, source, config, schemes):
        names = [name.removesuffix(".toy") for name in source.tensors if name.endswith(".toy")]
        return (
            Coded(self.name, source, {f"{n}.weight": self._weight(source, n) for n in names})
            if names
            else None
        )

    def _weight(self, source, name):
        codes, scale, shift = f"{name}.toy", f"{name}.toy_scale", f"{name}.toy_shift"

        def decoded(expert, rows):
            shifted = source.read(codes, rows).float() - source.read(shift)
            return {"weight": shifted * source.read(scale, rows)}

        shape = tuple(source.tensors[codes].shape)
        if shift in source.tensors:
            return CodedTensor(shape, torch.bfloat16, None, (codes, scale, shift), read=decoded)
        keys = {"weight": codes, "weight_scale": scale}
        return CodedTensor(shape, torch.bfloat16, INT8, (codes, scale), keys)


def stored(model, names, shift=()):
    tensors = dict(model.state_dict())
    for name in names:
        weight = numerics.quantize_weight(tensors.pop(f"{name}.weight"), INT8)
        tensors |= {f"{name}.toy": weight["weight"], f"{name}.toy_scale": weight["weight_scale"]}
        if name in shift:
            tensors[f"{name}.toy_shift"] = torch.tensor(3.0)
    return tensors


def values(tensors, name):
    shifted = tensors[f"{name}.toy"].float() - tensors.get(f"{name}.toy_shift", 0)
    return shifted * tensors[f"{name}.toy_scale"]


def load(tensors, *args, **options):
    return quantport.load(Memory(tensors), *args, model=Net, device="cpu", registry=knowing(Toy()), **options)


LINEAR = ("a", "read", "b")
EXPERTS = tuple(f"moe.experts.{e}.{p}_proj" for e in range(3) for p in ("gate", "up", "down"))


def test_experts_that_are_modules_of_their_own_are_kept():
    tensors = stored(made(Net), (*LINEAR, *EXPERTS))
    model = load(tensors)
    for name in EXPERTS:
        module = model.get_submodule(name)
        assert isinstance(module, QuantModule)
        assert same_bits(module.stored_weight()["weight"], tensors[f"{name}.toy"])
    steps = model.quantport_plan.by_layer
    assert all(steps[name].stored for name in EXPERTS)


def test_what_no_module_keeps_is_decoded_and_the_plan_says_so():
    tensors = stored(made(Net), LINEAR)
    step = load(tensors).quantport_plan.by_layer["read"]
    assert step.note.endswith("; stored as codes, decoded to torch.bfloat16")
    assert (step.before, step.after) == (64 * 32 + 4 * 32, 2 * 64 * 32)
    model = load(tensors)
    assert same_bits(model.read.weight.data, values(tensors, "read").bfloat16())


@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_what_no_scheme_holds_is_decoded_once(scheme):
    tensors = stored(made(Net), LINEAR, shift=("a",))
    model = load(tensors, scheme)
    if scheme is None:
        assert same_bits(model.a.weight.data, values(tensors, "a").bfloat16())
        note = model.quantport_plan.by_layer["a"].note
        assert note.endswith("stored as codes, decoded to torch.bfloat16")
    else:
        expected = numerics.quantize_weight(values(tensors, "a"), BUILTIN[scheme])
        assert same_bits(model.a.stored_weight()["weight_packed"], expected["weight_packed"])


def test_nothing_is_quantized_that_nobody_asked_for():
    assert {s.layer.name for s in load(stored(made(Net), ("a",))).quantport_plan.quantized} == {"a"}


def test_stored_tensors_of_another_shape_are_refused():
    tensors = stored(made(Net), ("a",))
    tensors["a.toy_scale"] = tensors["a.toy_scale"][:32]
    for scheme in (None, "nf4"):
        with pytest.raises(CheckpointError) as caught:
            load(tensors, scheme)
        assert "a.weight" in caught.value.asked
        assert "weight_scale [32, 1]" in caught.value.found


def test_what_is_decoded_is_counted_in_fp32():
    needs = []
    for tensors in (made(Net).state_dict(), stored(made(Net), LINEAR)):
        options = {"model": Net, "device": "cpu", "registry": knowing(Toy())}
        with prepared(Memory(tensors), "nf4", **options) as ready:
            needs.append({task.module: task.need for task in ready.filler.tasks()}["a"])
    assert needs[1] - needs[0] == 2 * 64 * 32  # two bytes more for each value


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("b.weight", torch.ones(16, 32, dtype=torch.int8)),
        ("b.weight", torch.ones(16, 32).to(torch.float8_e4m3fn)),
        ("b.qweight", torch.ones(4, 16, dtype=torch.int32)),
    ],
)
def test_codes_of_a_second_quantizer_are_refused(name, codes):
    tensors = stored(made(Net), ("a",))
    del tensors["b.weight"]
    tensors[name] = codes
    with pytest.raises(CheckpointError) as caught:
        load(tensors)
    assert name in caught.value.found
    assert "part of no weight of this format" in caught.value.found


def test_blocks_that_two_projections_share_are_decoded():
    """Gate and up of 192 rows each: the scales of rows 128 to 255 are of both."""
    shape, blocks = (2, 384, 128), torch.rand(2, 3, 1)
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    down = torch.randn(2, 128, 192).to(torch.float8_e4m3fn)
    tensors = {
        "experts.gate_up_proj": codes,
        "experts.gate_up_proj_scale_inv": blocks,
        "experts.down_proj": down,
        "experts.down_proj_scale_inv": torch.rand(2, 1, 2),
    }
    scheme = BUILTIN["fp8_per_block"]

    def read(name):
        def rows(expert, some):
            scale = tensors[f"{name}_scale_inv"][expert, some.start // 128 : -(-some.stop // 128)]
            return {"weight": tensors[name][expert, some], "weight_scale": scale}

        return rows

    names = ("experts.gate_up_proj", "experts.down_proj")
    coded = {
        n: CodedTensor(tuple(tensors[n].shape), torch.bfloat16, scheme, (n, f"{n}_scale_inv"), read=read(n))
        for n in names
    }
    found = Coded("toy", Memory(tensors), coded)
    assert not found.quantized()
    expected = (codes.float() * blocks.repeat_interleave(128, 1))[1, 192:]
    assert same_bits(found.source.read("experts.gate_up_proj", (1, slice(192, 384))), expected)
