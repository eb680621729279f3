"""Every public name explains itself, and every hook is documented and called."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import house_source as house
import pytest
from pluggy import PluginManager

import quantport
import quantport.backend
from quantport.kernels.base import Kernel
from quantport.plugins import hookspecs, registry
from quantport.plugins.hookspecs import Backend

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("quantport_"))


@pytest.mark.parametrize("module", [quantport, quantport.backend], ids=lambda m: m.__name__)
def test_public_names_are_documented(module):
    silent = []
    for name in module.__all__:
        value = getattr(module, name)
        # aliases and tables cannot
        own = inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)
        if own and not inspect.getdoc(value):
            silent.append(name)
    assert not silent
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("contract", [Backend, Kernel])
def test_methods_of_the_contract_are_documented(contract):
    members = {n: v for n, v in vars(contract).items() if inspect.isfunction(v) and not n.startswith("_")}
    assert members
    assert not [name for name, member in members.items() if not member.__doc__]


def test_hooks_are_documented_and_registered():
    manager = PluginManager("quantport")
    manager.add_hookspecs(hookspecs)
    assert HOOKS
    assert sorted(name for name in dir(manager.hook) if not name.startswith("_")) == HOOKS
    assert not [name for name in HOOKS if not getattr(hookspecs, name).__doc__]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_called_by_the_registry(name):
    strings = {
        n.value
        for n in ast.walk(house.tree(house.CORE / "plugins" / "registry.py"))
        if isinstance(n, ast.Constant)
    }
    attributes = {
        n.attr
        for n in ast.walk(house.tree(house.CORE / "plugins" / "registry.py"))
        if isinstance(n, ast.Attribute)
    }
    names = [
        getattr(registry, n.id, None)
        for n in ast.walk(house.tree(house.CORE / "plugins" / "registry.py"))
        if isinstance(n, ast.Name)
    ]
    assert name in [*strings, *attributes, *names]


@pytest.mark.parametrize("door", ["backend.py", "engine.py"])
def test_doors_define_nothing(door):
    kinds = {type(node).__name__ for node in house.tree(house.CORE / door).body}
    assert kinds <= {"Expr", "Import", "ImportFrom", "Assign"}


def test_layers_import_downwards_only():
    call = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
        "--no-cache",
    ]
    done = subprocess.run(call, cwd=house.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
