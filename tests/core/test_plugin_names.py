"""Names that plugins give to what they bring: none that is taken, and none that nobody could ask for."""

from __future__ import annotations

import warnings

import pytest
import typer
from core_fakes import plugin

from quantport.cli.app import add_plugin_commands, app
from quantport.errors import ConfigError
from quantport.numerics.solvers import Solver
from quantport.plugins.registry import Registry
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN, Schemes

INT8 = Quant("int8", (1, 0))


def aside(point, named):
    """Just this plugin was set aside, at import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        registry = Registry([point])
    (problem,) = registry.problems
    assert (problem.plugin, problem.stage) == (point.name, "import")
    assert named in problem.error
    assert not registry.commands
    assert not registry.solvers
    assert len(registry.schemes) == len(BUILTIN)


class Named(Solver):
    def __init__(self, name):
        self.name = name

    def solve(self, weight, scheme, stats=None):
        raise NotImplementedError


@pytest.mark.parametrize("name", ["int8", "w4a16", "FP8", "q4_k", "two words", "", 3])
def test_a_solver_is_not_named_as_a_scheme_or_by_no_name(monkeypatch, name):
    bad = plugin(monkeypatch, "bad", "quantport.plugins", quantport_solvers=lambda: [Named(name)])
    aside(bad, "a name of its own")


def test_a_scheme_is_not_named_as_a_solver():
    solvers = [Named("mine")]
    assert "int8:mine" in Schemes(BUILTIN.values(), solvers)
    with pytest.raises(ConfigError, match="of a scheme"):
        Schemes([*BUILTIN.values(), Scheme("Mine", INT8, None, "")], solvers)


@pytest.mark.parametrize("name", ["Int8", "two words", "", " int9", 3])
def test_a_scheme_has_a_name_that_can_be_asked_for(monkeypatch, name):
    schemes = [Scheme(name, INT8, None, "")]
    bad = plugin(monkeypatch, "bad", "quantport.plugins", quantport_schemes=lambda: schemes)
    aside(bad, "under the name")


@pytest.mark.parametrize(
    "name", ["", "--help", "-x", "two words", "Up", "new\nline", "a--b", 3, None, "plan"]
)
def test_odd_names_of_commands(monkeypatch, name):
    bad = plugin(monkeypatch, "bad", "quantport.plugins", quantport_commands=lambda: {name: print})
    aside(bad, "command")


def odd(things: list[list[int]]) -> None:
    """Takes what no option can be."""


def greet() -> None:
    """Greets."""
    typer.echo("hello")


def test_a_command_that_typer_cannot_take_stops_no_other(monkeypatch):
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    point = plugin(
        monkeypatch, "bad", "quantport.plugins", quantport_commands=lambda: {"odd": odd, "greet": greet}
    )
    registry = Registry([point])
    with pytest.warns(RuntimeWarning, match="'bad' aside at command"):
        add_plugin_commands(registry)
    assert [p.stage for p in registry.problems] == ["command"]
    names = {c.name for c in app.registered_commands}
    assert "greet" in names
    assert "odd" not in names
    assert typer.main.get_command(app)
