"""Each mend of `house_mutations` is noticed: where a copy of the packages is without it, a test fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import house_source as house
import pytest
from house_mutations import LINES, MUTATIONS

pytestmark = pytest.mark.slow
FOLDERS = ("core", "plugins/formats", "plugins/transformers", *(f"backends/{name}" for name in house.rooms()))
NOT_THE_COPY = 9  # an exit code that pytest has not
# A plugin of pytest: the exit code says where the packages came from.
WATCH = f"""
import sys
from pathlib import Path

COPY = Path(__file__).parent.parent


def pytest_sessionfinish(session):
    import quantport  # where no test has, but the processes that it starts

    ours = [m for name, m in sys.modules.items() if name.split(".")[0].startswith("quantport")]
    files = [Path(m.__file__) for m in ours if getattr(m, "__file__", None)]
    if not all(file.is_relative_to(COPY) for file in files):
        session.exitstatus = {NOT_THE_COPY}
"""


class Copy:
    """A copy of the packages, and runs of tests on it.

    Args:
        root: Where to; empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for package in (p for folder in FOLDERS for p in (house.ROOT / folder).glob("quantport*")):
            target = root / package.relative_to(house.ROOT)
            shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
        (root / "watch").mkdir()
        (root / "watch" / "watch_imports.py").write_text(WATCH, encoding="utf-8")

    def run(self, tests, packages=FOLDERS):
        """Runs tests, named from ``tests/``, on the packages in folders of the copy."""
        options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "watch_imports")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST_"))}
        env["PYTHONPATH"] = os.pathsep.join(str(self.root / place) for place in (*packages, "watch"))
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)],
            cwd=house.ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
        )

    @contextmanager
    def mutated(self, mutation):
        """Inside, the copy is without a mend."""
        file = self.root / mutation.file
        source = file.read_text(encoding="utf-8")
        assert source.count(mutation.old) == 1, (
            f"the table is stale: {mutation.file} has no such text, or two"
        )
        try:
            _write(file, source.replace(mutation.old, mutation.new))
            yield
        finally:
            _write(file, source)


def _write(file, source):
    """Writes a module; what Python has compiled of it may be of the same second and size, so it goes."""
    compile(source, file, "exec")
    file.write_text(source, encoding="utf-8")
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return Copy(tmp_path_factory.mktemp("copy"))


def test_every_line_has_mutations():
    assert {mutation.line for mutation in MUTATIONS} == set(LINES)
    assert len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)


def by_file():
    """The tests of all mutations, by their file."""
    tests = dict.fromkeys(test for mutation in MUTATIONS for test in mutation.tests)
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    return {file: [test for test in tests if test.partition("::")[0] == file] for file in files}


@pytest.mark.parametrize("file", by_file())
def test_what_is_not_mutated_passes(file, copy):
    done = copy.run(by_file()[file])
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_packages_of_the_repository_are_told_from_the_copy(copy):
    packages = [house.ROOT / folder for folder in FOLDERS]
    done = copy.run(["core/test_patterns.py::test_a_glob_of_many_stars_is_quick"], packages)
    assert done.returncode == NOT_THE_COPY, done.stdout[-3000:]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.line}: {m.mend}")
def test_a_mutation_is_noticed(mutation, copy):
    with copy.mutated(mutation):
        done = copy.run(mutation.tests)
    assert done.returncode == 1, done.stdout[-3000:]
    assert "\nFAILED tests/" in done.stdout, done.stdout[-3000:]
