"""What a stranger may bring, and what sets it aside: nothing of quantport's own is ever displaced."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Mapping
from importlib.metadata import Distribution, EntryPoint

import pytest
import typer
from core_fakes import FakeBackend, FakeKernel, arch, device, plugin
from typer.testing import CliRunner

from quantport.backend import hookimpl
from quantport.checkpoint.format import CheckpointFormat
from quantport.cli.app import add_plugin_commands, app
from quantport.numerics.solvers import Solver
from quantport.plugins.check_plugin import COMMANDS, HOOKS
from quantport.plugins.entry_points import installed, is_builtin
from quantport.plugins.registry import Registry
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN, Schemes

INT8 = Quant("int8", (1, 0))


class Gguf(CheckpointFormat):
    name = "toy-format"

    def recognize(self, source, config, schemes):
        return None


class Awq(Solver):
    name = "toy-solver"

    def solve(self, weight, scheme, stats=None):
        raise NotImplementedError


def greet() -> None:
    """Greets."""
    typer.echo("hello")


def stranger(monkeypatch, **hooks):
    return plugin(monkeypatch, "stranger", "quantport.plugins", **hooks)


def module(monkeypatch, name, **members):
    """A plugin whose functions are as they are: marked or not."""
    made = types.ModuleType(f"plugin_{name}")
    for key, value in members.items():
        if isinstance(value, types.FunctionType):
            value.__module__ = made.__name__
        setattr(made, key, value)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return EntryPoint(name, made.__name__, "quantport.plugins")


def aside(point, *named, also=()):
    """A registry in which just this plugin was set aside, for a reason that names these, and left nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry([*also, point])
        kernels = {kind: registry.kernels(kind) for kind in registry.backends}
    assert [problem.plugin for problem in registry.problems] == [point.name], registry.problems
    assert len(caught) == 1
    for name in named:
        assert name in registry.problems[0].error
    assert not registry.commands
    assert not registry.solvers
    assert not registry.formats
    return registry, kernels


def test_every_hook_brings_something(monkeypatch):
    registry = Registry(
        [
            stranger(
                monkeypatch,
                quantport_schemes=lambda: [Scheme("mine", INT8, None, "")],
                quantport_checkpoint_formats=lambda: [Gguf()],
                quantport_solvers=lambda: [Awq()],
                quantport_commands=lambda: {"greet": greet},
                quantport_backend=lambda: FakeBackend("toy"),
            )
        ]
    )
    assert not registry.problems
    assert list(registry.formats) == ["toy-format"]
    assert list(registry.solvers) == ["toy-solver"]
    assert registry.commands == {"greet": greet}
    assert "mine" in registry.schemes
    assert "toy" in registry.backends
    assert set(HOOKS) == {
        "quantport_backend",
        "quantport_kernels",
        "quantport_schemes",
        "quantport_solvers",
        "quantport_checkpoint_formats",
        "quantport_commands",
    }


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"quantport_checkpoint_formats": lambda: [Gguf(), Gguf()]}, ["'toy-format'", "taken"]),
        ({"quantport_checkpoint_formats": lambda: [Awq()]}, ["CheckpointFormat"]),
        ({"quantport_solvers": lambda: [Awq(), Awq()]}, ["'toy-solver'", "taken"]),
        ({"quantport_solvers": lambda: None}, ["TypeError"]),
        ({"quantport_commands": lambda: {"plan": greet}}, ["'plan'", "taken"]),
        ({"quantport_commands": lambda: {"greet": "hello"}}, ["'greet'", "a function"]),
        (
            {"quantport_backend": lambda: FakeBackend("toy", found=1), "quantport_solvers": lambda: 1 // 0},
            ["Zero"],
        ),
    ],
)
def test_what_clashes_sets_the_whole_plugin_aside(monkeypatch, bad, named):
    whole = {
        "quantport_schemes": lambda: [Scheme("mine", INT8, None, "")],
        "quantport_solvers": lambda: [Awq()],
        "quantport_commands": lambda: {"greet": greet},
    }
    registry, _ = aside(stranger(monkeypatch, **{**whole, **bad}), *named)
    assert set(registry.schemes) == set(BUILTIN)
    assert not registry.backends


@pytest.mark.parametrize("mark", [hookimpl, lambda function: function], ids=["marked", "unmarked"])
def test_what_looks_like_a_hook_and_is_none(monkeypatch, mark):
    def quantport_backnd():
        raise AssertionError("called")

    point = module(monkeypatch, "typo", quantport_backnd=mark(quantport_backnd))
    aside(point, "quantport_backnd", "did you mean 'quantport_backend'")


def test_a_hook_that_is_not_marked(monkeypatch):
    def quantport_schemes():
        raise AssertionError("called")

    aside(
        module(monkeypatch, "bare", quantport_schemes=quantport_schemes), "quantport_schemes", "mark it with"
    )


def test_a_hook_of_another_version_may_be_optional(monkeypatch):
    def quantport_of_tomorrow():
        raise AssertionError("called")

    optional = hookimpl(optionalhook=True)(quantport_of_tomorrow)
    assert not Registry([module(monkeypatch, "new", quantport_of_tomorrow=optional)]).problems


def test_a_hook_under_another_name_is_called(monkeypatch):
    def schemes_of_mine():
        return [Scheme("mine", INT8, None, "")]

    marked = hookimpl(specname="quantport_schemes")(schemes_of_mine)
    assert "mine" in Registry([module(monkeypatch, "other", schemes_of_mine=marked)]).schemes


@pytest.mark.parametrize("option", ["wrapper", "hookwrapper", "tryfirst", "trylast"])
def test_hooks_are_neither_wrapped_nor_ordered(monkeypatch, option):
    def quantport_schemes():
        yield

    marked = hookimpl(**{option: True})(quantport_schemes)
    aside(module(monkeypatch, "wraps", quantport_schemes=marked), option, "nothing to wrap or to order")


def test_a_hook_with_arguments(monkeypatch):
    def quantport_schemes(config):
        return []

    aside(module(monkeypatch, "asks", quantport_schemes=hookimpl(quantport_schemes)), "config")


def builtin(point):
    """The same entry point, as one of the distribution of quantport."""

    class Ours(Distribution):
        metadata: Mapping[str, str] = {"Name": "quantport"}

        def read_text(self, filename):
            return None

        def locate_file(self, path):
            raise NotImplementedError

    return point._for(Ours())


def test_nobody_displaces_what_quantport_brings(monkeypatch):
    """The names of ``aaa`` sort before all others."""
    ours = builtin(
        plugin(
            monkeypatch, "zzz", quantport_backend=lambda: FakeBackend("cpu", kernels=[FakeKernel("cpu.int8")])
        )
    )
    kernels_of_mine = [FakeKernel("cpu.int8"), FakeKernel("mine.k")]
    thieves = [
        {"quantport_backend": lambda: FakeBackend("cpu")},
        {
            "quantport_backend": lambda: FakeBackend("mine"),
            "quantport_schemes": lambda: [Scheme("int8", INT8, None, "")],
        },
        {"quantport_backend": lambda: FakeBackend("mine", found=[device("mine")], kernels=kernels_of_mine)},
    ]
    for hooks, named in zip(thieves, ("kind 'cpu'", "int8", "'cpu.int8' is taken"), strict=True):
        registry, kernels = aside(plugin(monkeypatch, "aaa", **hooks), named, also=[ours])
        assert [k.name for k in kernels["cpu"]] == ["cpu.int8"]
        assert registry.kernel("cpu.int8") is kernels["cpu"][0]
        assert registry.schemes["int8"] is BUILTIN["int8"]
        assert kernels.get("mine", ()) == ()
    assert all(map(is_builtin, installed())), "the installed ones come from the distribution of quantport"


class Old(FakeKernel):
    pass


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("deviation", "numeric_deviation"),
        ("bundle", "prepare_grouped"),
        ("stack", "allocate"),
        ("slot", "expert_view"),
        ("run_grouped", "GroupedKernel"),
        ("run_gated", "GroupedKernel"),
    ],
)
def test_kernels_written_for_names_of_before(monkeypatch, old, new):
    monkeypatch.setattr(Old, old, "rounds to bfloat16", raising=False)
    backend = FakeBackend("old", kernels=[Old("old.k")])
    point = plugin(monkeypatch, "old", quantport_backend=lambda: backend)
    _, kernels = aside(point, old, new)
    assert kernels["old"] == ()


def test_an_architecture_written_for_names_of_before(monkeypatch):
    backend, old = FakeBackend("old"), arch("old")
    object.__setattr__(old, "opaque", frozenset())
    backend.archs["a1"] = old
    aside(plugin(monkeypatch, "old", quantport_backend=lambda: backend), "opaque", "storage_only_dtypes")


def test_commands_of_plugins_stand_beside_those_of_quantport(monkeypatch):
    own = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert own == set(COMMANDS)
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    registry = Registry([stranger(monkeypatch, quantport_commands=lambda: {"greet": greet})])
    add_plugin_commands(registry)
    assert CliRunner().invoke(app, ["greet"]).output == "hello\n"
    assert "greet" in CliRunner().invoke(app, ["--help"]).output


def test_schemes_are_looked_up_once():
    schemes, calls = Schemes(BUILTIN.values()), []
    option = Scheme.option
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheme, "option", lambda self, name: calls.append(name) or option(self, name))
        assert schemes["mxfp4:floor"] is schemes["mxfp4:floor"]
    assert calls == ["floor"]
    assert schemes["mxfp4:floor"] == BUILTIN["mxfp4:floor"]


def test_a_scheme_with_a_colon_in_its_name_is_set_aside(monkeypatch):
    bad = stranger(monkeypatch, quantport_schemes=lambda: [Scheme("mine:too", INT8, None, "")])
    registry, _ = aside(bad, "'mine:too'", "colon")
    assert list(registry.schemes.values()) == list(BUILTIN.values())


def test_a_restriction_holds_for_backends_of_other_plugins_too(monkeypatch):
    both = stranger(
        monkeypatch,
        quantport_backend=lambda: FakeBackend("toy", found=1),
        quantport_schemes=lambda: [Scheme("mine", INT8, None, "")],
    )
    registry = Registry([*installed(), both], only=["cpu"])
    assert list(registry.backends) == ["cpu"]
    assert "mine" in registry.schemes
