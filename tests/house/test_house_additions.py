"""Every kind of addition is one file and its registration: a stranger's, added from outside, does its work.

CONTRIBUTING.md has a row for each kind; what is written here is what it asks for.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
import typer
from house_source import ROOT
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import quantport
from quantport.cli import app as command_line
from quantport.plugins.entry_points import BACKENDS, PLUGINS, installed
from quantport.plugins.registry import Registry

SCHEME = """
from quantport.backend import Quant, Scheme, hookimpl


@hookimpl
def quantport_schemes():
    return [Scheme("int8_g64", Quant("int8", (1, 64)), None, "INT8 in groups of 64")]
"""
SOLVER = """
from quantport.backend import Solver, hookimpl, numerics


class Clipped(Solver):
    name = "clipped"

    def solve(self, weight, scheme, stats=None):
        bound = weight.abs().amax(1, keepdim=True) / 2
        return numerics.quantize_weight(weight.clamp(-bound, bound), scheme.unsolved)


@hookimpl
def quantport_solvers():
    return [Clipped()]
"""
KERNEL = """
from quantport.backend import Claim, Evidence, Kernel, hookimpl, numerics


class Mine(Kernel):
    name = "mine.int8"

    def serves(self, scheme):
        return scheme.name == "int8_weight_only"

    def reasons_against(self, request):
        return ()

    def claim(self, request):
        return Claim(Evidence.DECLARED, "mine.example")

    def speed(self, request):
        return 1000.0

    def run(self, x, packed, bias, spec):
        return numerics.linear(x, self.unpack(packed, spec), spec.scheme, bias)


@hookimpl
def quantport_kernels():
    return {"cpu": [Mine()]}
"""
BACKEND = """
from quantport.backend import Arch, Backend, Device, aten, hookimpl

V1 = Arch("mine", "v1", "Mine 1", frozenset({"bf16"}), "mine.example/isa")


class Mine(Backend):
    kind = "mine"
    torch_type = "cpu"
    archs = {"v1": V1}

    def detect(self):
        return [Device(V1)]

    def kernels(self):
        return aten.portable()


@hookimpl
def quantport_backend():
    return Mine()
"""
FORMAT = """
from functools import partial

import torch

from quantport.backend import hookimpl
from quantport.engine import CheckpointFormat, Layer, Part, QuantizedWeight, Recognized, Role


class Mine(Recognized):
    def __init__(self, source, scheme):
        super().__init__("mine", source)
        self.scheme = scheme

    def layers(self):
        codes = {n: t for n, t in self.source.tensors.items() if n.endswith(".codes")}
        return [
            Layer(
                name.removesuffix(".codes"), "linear", (("weight", *tensor.shape),), torch.bfloat16,
                parts={"weight": (Part(name), Part(name.replace("codes", "steps")))}, role=Role.LINEAR,
            )
            for name, tensor in codes.items()
        ]

    def quantized(self):
        return {layer.name: {"": self.weight(layer.name)} for layer in self.layers()}

    def weight(self, name):
        read = partial(self.stored, f"{name}.codes", f"{name}.steps")
        return QuantizedWeight(self.scheme, (f"{name}.codes", f"{name}.steps"), read)

    def stored(self, codes, steps, rows):
        return {"weight": self.source.read(codes, rows), "weight_scale": self.source.read(steps, rows)}


class MineFormat(CheckpointFormat):
    name = "mine"

    def recognize(self, source, config, schemes):
        mine = any(name.endswith(".codes") for name in source.tensors)
        return Mine(source, schemes["int8_weight_only"]) if mine else None


@hookimpl
def quantport_checkpoint_formats():
    return [MineFormat()]
"""
COMMAND = """
import typer

from quantport.backend import hookimpl


def greet(name: str) -> None:
    "Greets somebody."
    typer.echo(f"hello {name}")


@hookimpl
def quantport_commands():
    return {"greet": greet}
"""
INTEGRATION = """
from torch import nn

from quantport.engine import (
    QuantLinear, Request, WeightSpec, default_registry, quantize_weight, select_kernel, swap_modules,
)


def convert(model, scheme):
    registry = default_registry()
    device = registry.device("cpu")
    new = {}
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear:
            spec = WeightSpec(registry.schemes[scheme], *layer.weight.shape)
            choice = select_kernel(Request(spec, "linear", device), registry.kernels("cpu"))
            new[path] = QuantLinear(registry.kernel(choice.kernel), spec, layer.bias)
            new[path].set_weight("", quantize_weight(layer.weight.detach(), spec.scheme))
    swap_modules(model, new)
"""


def make():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in make().state_dict().items()}, path)
    return path


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Writes a stranger's one file, and registers it as a package would."""

    def one_file(source, group=PLUGINS):
        path = tmp_path / "stranger_of_a_test.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("stranger_of_a_test", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, spec.name, module)
        if group is None:
            return module
        registry = Registry([*installed(), EntryPoint("stranger", spec.name, group)])
        assert not registry.problems
        return registry

    return one_file


def test_scheme(add, checkpoint):
    model = quantport.load(checkpoint, "int8_g64", model=make, device="cpu", registry=add(SCHEME))
    assert model[0].scheme == "int8_g64"
    assert model[0].stored_weight()["weight_scale"].shape == (128, 1)
    assert model(torch.ones(2, 64).bfloat16()).shape == (2, 64)


def test_solver(add, checkpoint):
    registry = add(SOLVER)
    mine, usual = (
        quantport.load(checkpoint, scheme, model=make, device="cpu", registry=registry)[0].stored_weight()
        for scheme in ("int8_weight_only:clipped", "int8_weight_only")
    )
    assert torch.allclose(mine["weight_scale"], usual["weight_scale"] / 2, rtol=2e-2)


def test_kernel(add, checkpoint):
    registry = add(KERNEL)
    model = quantport.load(checkpoint, "int8_weight_only", model=make, device="cpu", registry=registry)
    assert model[0].kernel.name == "mine.int8"
    assert model.quantport_plan.by_layer["0"].choice.kernel == "mine.int8"
    assert model(torch.ones(2, 64).bfloat16()).isfinite().all()


def test_backend(add, checkpoint):
    registry = add(BACKEND, BACKENDS)
    assert "mine:v1" in {str(cell.arch) for cell in quantport.matrix("int8", registry=registry)}
    model = quantport.load(checkpoint, "int8", model=make, device="mine", registry=registry)
    assert model.quantport_plan.device.kind == "mine"
    assert model[0].kernel.name == "torch.dequantize"


def test_checkpoint_format(add, checkpoint, tmp_path):
    expected = quantport.load(checkpoint, "int8_weight_only", model=make, device="cpu")
    tensors = {}
    for path in ("0", "2"):
        stored = expected.get_submodule(path).stored_weight()
        tensors |= {f"{path}.codes": stored["weight"], f"{path}.steps": stored["weight_scale"]}
        tensors[f"{path}.bias"] = expected.get_submodule(path).bias.detach()
    save_file(tensors, tmp_path / "mine.safetensors")
    model = quantport.load(tmp_path / "mine.safetensors", model=make, device="cpu", registry=add(FORMAT))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_command(add):
    program = typer.Typer()
    names = [info.name or info.callback.__name__ for info in command_line.registered_commands]
    for name, function in add(COMMAND).commands.items():
        assert name not in names
        program.command(name)(function)
    assert CliRunner().invoke(program, ["you"]).output == "hello you\n"


def test_integration(add):
    model = make().bfloat16()
    add(INTEGRATION, None).convert(model, "int8_weight_only")
    assert {layer.scheme for layer in model if isinstance(layer, nn.Linear)} == {"int8_weight_only"}
    assert model(torch.ones(2, 64).bfloat16()).shape == (2, 64)


def test_every_row_of_the_page_is_tried_and_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where an addition goes")[2]
    rows = re.findall(r"^\| ([a-z][a-z ]+) \| (.+?) \| (.+?) \| (.+?) \|$", text.partition("\n## ")[0], re.M)
    rows = rows[1:]  # without its head
    assert {f"test_{kind.replace(' ', '_')}" for kind, *_ in rows} == {
        name for name in globals() if name.startswith("test_") and not name.startswith("test_every")
    }
    for kind, here, _, outside in rows:
        for path in re.findall(r"`([\w/]+/(?:[\w.]+)?)`", here):
            assert list(ROOT.glob(path)) or "NAME" in path, (kind, path)
        for hook in re.findall(r"`(quantport_\w+)`", outside):
            assert hook in (ROOT / "core/quantport/plugins/hookspecs.py").read_text(encoding="utf-8")
