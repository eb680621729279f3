"""The rules of the house that neither ruff nor import-linter knows."""

from __future__ import annotations

import ast

import house_source as house
import pytest

VENDORS = {
    "cuda",
    "rocm",
    "hip",
    "xpu",
    "npu",
    "ascend",
    "triton",
    "nvidia",
    "amd",
    "gaudi",
    "musa",
    "cann",
    "mps",
}
# The conformance suite asks that the import of a room wakes no runtime, so that it has to name the runtimes.
NAMED = {
    "core/quantport/testing/check_backend.py": "the runtimes that importing a room must not load or wake",
}
SHIPPED = house.files(*house.SHIPPED)


def ids(path):
    return str(path.relative_to(house.ROOT))


@pytest.mark.parametrize("path", house.files("core"), ids=ids)
def test_core_names_no_vendor(path):
    found = [f"{house.where(path, line)} {word}" for line, word in house.words(path) if word in VENDORS]
    if ids(path) not in NAMED:
        assert not found


def test_exceptions_are_still_needed():
    for name in NAMED:
        path = house.ROOT / name
        assert not path.exists() or any(word in VENDORS for _, word in house.words(path)), name


@pytest.mark.parametrize("path", house.files("backends"), ids=ids)
def test_rooms_import_the_house_through_one_door(path):
    own = path.relative_to(house.ROOT / "backends").parts[1]
    allowed = ("quantport.backend", own, *(f"quantport_{name}" for name in house.NO_DEVICE))
    found = [
        f"{house.where(path, line)} {module}"
        for line, module in house.imports(path)
        if module.split(".")[0].startswith("quantport")
        and not any(module == a or module.startswith(f"{a}.") for a in allowed)
    ]
    assert not found


@pytest.mark.parametrize("name", sorted(house.INTEGRATIONS))
def test_integrations_import_the_house_through_its_public_doors(name):
    allowed = ("quantport", "quantport.engine", f"quantport_{name}")
    found = [
        f"{house.where(path, line)} {module}"
        for path in house.files(f"plugins/{name}")
        for line, module in house.imports(path)
        if module.split(".")[0].startswith("quantport")
        and module not in allowed
        and not module.startswith(("quantport.engine.", f"quantport_{name}."))
    ]
    assert not found


@pytest.mark.parametrize("path", SHIPPED, ids=ids)
def test_imports_are_absolute_and_named(path):
    assert not [
        f"{house.where(path, n)} {m}" for n, m in house.imports(path) if m.startswith(".") or m.endswith("*")
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=ids)
def test_files_and_functions_are_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert not [
        f"{house.where(path, n)} {name}: {size} lines" for n, name, size in house.functions(path) if size > 60
    ]


def test_the_rules_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        '"""cuda may be named here."""\nfrom . import x\nfrom os import *\nNAME = "npu:0"  # xpu\n',
        encoding="utf-8",
    )
    assert [word for _, word in house.words(bad) if word in VENDORS] == ["npu"]
    assert {module for _, module in house.imports(bad)} == {".", "os.*"}


DOORS = {
    "__init__.py",
    "cli/app.py",
    "cli/bench_linear.py",
    "cli/doctor.py",
    "cli/run_model.py",
    "loading/kv_caches.py",
    "loading/library_config.py",
    "loading/load_model.py",
    "loading/partial_load.py",
    "loading/plan_model.py",
    "loading/quantize_model.py",
    "loading/save_model.py",
    "modules/base.py",
    "modules/handles.py",
    "planning/capability_matrix.py",
    "plugins/registry.py",
    "testing/check_refused.py",
    "testing/subject.py",
}
DEFAULTS_ONLY = ("loading", "planning", "modules/base.py")


def _asks(node):
    return isinstance(node, ast.Call) and "default_registry" in ast.unparse(node.func)


def test_registries_are_passed_in():
    """Only a public door asks for the registry of the process, as the default of an argument; what another
    process wrote into a handle has nowhere else to look.
    """
    asking = {}
    for path in house.files("core"):
        nodes = list(ast.walk(house.tree(path)))
        if any(map(_asks, nodes)):
            asking[path.relative_to(house.CORE).as_posix()] = nodes
    assert set(asking) == DOORS
    for name, nodes in asking.items():
        if name.startswith(DEFAULTS_ONLY):
            defaults = {n.values[-1] for n in nodes if isinstance(n, ast.BoolOp) and isinstance(n.op, ast.Or)}
            assert {n for n in nodes if _asks(n)} <= defaults, name
