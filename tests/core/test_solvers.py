"""Solvers: quantport's own behind the seam, and a stranger's that comes from outside."""

from __future__ import annotations

import pytest
import torch
from core_models import same_bits
from torch import nn

import quantport
from quantport import numerics
from quantport.checkpoint import Checkpoint, save_tensors
from quantport.errors import BackendError, ConfigError, ShapeError, WeightError
from quantport.numerics.sharding import quantize_shard
from quantport.numerics.solvers import HalfQuadratic, LeastSquares, RoundToNearest, Solver, Stats, solver_of
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN, Schemes


class Halved(Solver):
    """Scales of half the range of a block: what is beyond saturates. Not what any rule gives."""

    name = "halved"

    def __init__(self) -> None:
        self.calls: list[Stats | None] = []

    def solve(self, weight, scheme, stats=None):
        self.calls.append(stats)
        half = weight.float().clamp(-weight.abs().amax() / 2, weight.abs().amax() / 2)
        return RoundToNearest().solve(half.to(weight.dtype), scheme)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.a(x)


def weight(n=32, k=64):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)).bfloat16()


def equal(a, b):
    return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)


@pytest.fixture
def halved(monkeypatch):
    solver = Halved()
    monkeypatch.setattr(default_registry(), "schemes", Schemes(BUILTIN.values(), [solver]))
    return solver


@pytest.fixture
def folder(tmp_path):
    return save_tensors(tmp_path / "m", [("a.weight", weight())])


@pytest.mark.parametrize(
    ("scheme", "solver"),
    [
        ("int8", RoundToNearest),
        ("mxfp4:mse", LeastSquares),
        ("int4_mse", LeastSquares),
        ("int4_hqq", HalfQuadratic),
    ],
)
def test_a_rule_names_its_solver(scheme, solver):
    assert type(solver_of(BUILTIN[scheme])) is solver


def test_a_solver_serves_every_scheme_that_it_can_solve():
    for plain, searched, solver in (
        ("mxfp4", "mxfp4:mse", LeastSquares()),
        ("int4_hqq", "int4_mse", LeastSquares()),
        ("int4_mse", "int4_hqq", HalfQuadratic()),
        ("nvfp4:mse", "nvfp4", RoundToNearest()),
    ):
        expected = numerics.quantize_weight(weight(), BUILTIN[searched])
        assert equal(numerics.quantize_weight(weight(), BUILTIN[plain], solver=solver), expected)


@pytest.mark.parametrize(
    ("scheme", "solver"),
    [("int8", LeastSquares()), ("mxfp4", HalfQuadratic()), ("int4_mse", RoundToNearest())],
)
def test_what_a_solver_cannot_solve_is_refused(scheme, solver):
    with pytest.raises(ConfigError, match=solver.name):
        numerics.quantize_weight(weight(), BUILTIN[scheme], solver=solver)


def test_statistics_add_up():
    x = torch.randn(6, 4).bfloat16()
    parts = Stats.of(x[:2]).update(x[2:3]).merge(Stats.of(x[3:].view(1, 3, 4)))
    assert parts.count == 6
    assert torch.allclose(parts.second_moments, x.double().square().mean(0))
    assert Stats.of(x[:0]).second_moments.tolist() == [0.0] * 4
    with pytest.raises(ShapeError, match="statistics of one layer"):
        parts.update(torch.ones(2, 5))


def test_a_stranger_is_an_option_of_every_scheme_that_quantizes(halved):
    schemes = default_registry().schemes
    scheme = schemes["w4a16:halved:hadamard"]
    assert scheme.solver is halved
    assert scheme.name == "int4_weight_only:halved:hadamard"
    assert scheme.unsolved == schemes["w4a16:hadamard"]
    assert scheme.layout(8, 64) == scheme.unsolved.layout(8, 64)
    assert schemes["int8"].unsolved is schemes["int8"]
    for wrong in ("bf16:halved", "int8:halved:halved", "int8:quartered"):
        with pytest.raises(ConfigError):
            schemes[wrong]


@pytest.mark.parametrize("name", ["mse", "even", "double", "hadamard", "a:b", "halved"])
def test_a_solver_takes_no_name_that_means_something_else(name):
    other = Halved()
    other.name = name
    with pytest.raises(ConfigError, match="a name of its own"):
        Schemes(BUILTIN.values(), [Halved(), other])


def test_a_strangers_solver_loads_and_no_fast_path_takes_its_place(halved, folder):
    model = quantport.load(folder, "int8_weight_only:halved", model=Net, device="cpu")
    assert len(halved.calls) == 1
    expected = Halved().solve(weight(), BUILTIN["int8_weight_only"])
    assert equal(model.a.stored_weight(), expected)
    assert not equal(expected, numerics.quantize_weight(weight(), BUILTIN["int8_weight_only"]))
    assert model(torch.ones(2, 64).bfloat16()).isfinite().all()


def test_backends_decline_a_scheme_with_a_solver(halved):
    scheme = default_registry().schemes["int8:halved"]
    for backend in default_registry().backends.values():
        assert backend.quantize_weight(weight(), scheme) is None
    numerics.quantize_weight(weight(), scheme, fast=lambda *_: pytest.fail("asked"))
    numerics.quantize_weight(weight(), BUILTIN["int8"], fast=lambda *_: pytest.fail("asked"), solver=halved)


def test_what_is_saved_needs_no_solver(halved, folder, tmp_path, monkeypatch):
    model = quantport.load(folder, "int4_weight_only_g32:halved", model=Net, device="cpu")
    path = quantport.save(model, tmp_path / "out")
    monkeypatch.setattr(default_registry(), "schemes", BUILTIN)
    again = quantport.load(path, model=Net, device="cpu")
    assert again.a.scheme == "int4_weight_only_g32"
    assert equal(again.state_dict(), model.state_dict())
    with Checkpoint.open(path) as checkpoint:
        assert set(checkpoint.tensors) == {"a.weight_packed", "a.weight_scale"}


def test_a_solver_sees_the_statistics_and_finite_rotated_weights(halved):
    seen = []
    halved.solve = lambda w, scheme, stats=None: seen.append((w, stats)) or RoundToNearest().solve(w, scheme)
    stats, w = Stats.of(torch.ones(3, 64)), weight()
    scheme = default_registry().schemes["w4a16:halved:hadamard"]
    numerics.quantize_weight(w, scheme, stats=stats)
    assert seen[0][1] is stats
    assert torch.equal(seen[0][0], numerics.rotate(w.float(), scheme.rotation))
    w[3, 5] = torch.nan
    with pytest.raises(WeightError, match="NaN or Inf"):
        numerics.quantize_weight(w, scheme)
    numerics.quantize_weight(w, scheme, nonfinite="zero")
    assert seen[-1][0].isfinite().all()


def test_a_solver_that_breaks_the_contract_is_named(halved):
    halved.solve = lambda w, scheme, stats=None: {"weight": w}
    with pytest.raises(BackendError, match="'halved'"):
        numerics.quantize_weight(weight(), default_registry().schemes["int8:halved"])


def test_a_shard_is_not_solved_by_a_stranger(halved):
    scheme = default_registry().schemes["int8:halved"]
    with pytest.raises(ConfigError, match="before it is split"):
        quantize_shard(weight(), scheme, 0, reduce=lambda x: x)
