"""Plugins that hang, end the process, print or answer nonsense: named and set aside; the others work."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import warnings
from importlib.metadata import EntryPoint

import pytest
import torch
from core_fakes import FakeBackend, FakeKernel, arch, backend_plugin, device, plugin
from core_models import DENSE
from core_references import check_parts

from quantport import plan
from quantport.cli import doctor
from quantport.device import Device
from quantport.errors import BackendError, ConfigError
from quantport.kernels.base import Request, WeightSpec
from quantport.kernels.verdict import Accepted, Claim, Evidence, Rejected, Status
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.guard import answers, time_limit
from quantport.plugins.registry import Registry
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN

INT8 = Quant("int8", (1, 0))


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("QUANTPORT_BACKENDS", "QUANTPORT_DEVICE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stuck(monkeypatch):
    """A call that hangs until the test has ended; the limit is short."""
    monkeypatch.setenv("QUANTPORT_PLUGIN_SECONDS", "0.2")
    ended = threading.Event()
    yield lambda: ended.wait(15) and ()
    ended.set()


@pytest.fixture
def good(monkeypatch):
    backend = FakeBackend("good", found=[device("good")], kernels=[FakeKernel("good.k")])
    return backend_plugin(monkeypatch, "good", backend)


def aside(*points, stage, named):
    """A registry in which just the last of these was set aside, and the first works."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry(points)
        assert [d.kind for d in registry.devices] == ["good"]
        assert [k.name for k in registry.kernels("good")] == ["good.k"]
    (problem,) = registry.problems
    assert (problem.plugin, problem.stage) == (points[-1].name, stage)
    assert named in problem.error
    assert [points[-1].name in str(w.message) for w in caught] == [True]
    return registry


def source(tmp_path, monkeypatch, text, group="quantport.plugins"):
    """A plugin from source, imported anew."""
    name = f"hostile_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return EntryPoint("bad", name, group)


# imports and hooks


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import sys\nsys.exit('no licence')", "SystemExit: no licence"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise SystemExit(0)", "SystemExit: 0"),
    ],
    ids=["exit", "interrupt", "zero"],
)
def test_an_import_that_ends_the_process(good, tmp_path, monkeypatch, text, named):
    aside(good, source(tmp_path, monkeypatch, text), stage="import", named=named)


def test_a_hook_that_ends_the_process(good, monkeypatch):
    bad = plugin(monkeypatch, "bad", "quantport.plugins", quantport_schemes=lambda: sys.exit(3))
    aside(good, bad, stage="import", named="SystemExit: 3")


def test_an_import_that_hangs(good, stuck, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.hang_for_a_test", stuck, raising=False)
    bad = source(tmp_path, monkeypatch, "hang_for_a_test()")
    aside(good, bad, stage="import", named="TimeoutError: no answer within 0.2 s (QUANTPORT_PLUGIN_SECONDS")


def test_what_is_late_is_not_taken(good, monkeypatch):
    monkeypatch.setenv("QUANTPORT_PLUGIN_SECONDS", "0.1")
    go, gone = threading.Event(), threading.Event()

    def schemes():
        go.wait(60)
        gone.set()
        return [Scheme("late", INT8, None, "")]

    bad = plugin(monkeypatch, "zlate", "quantport.plugins", quantport_schemes=schemes)
    registry = aside(good, bad, stage="import", named="TimeoutError")
    go.set()
    assert gone.wait(60)
    assert "late" not in registry.schemes


# detection, kernels, advice


def test_detection_that_hangs(good, stuck, monkeypatch):
    bad = backend_plugin(monkeypatch, "zbad", FakeBackend("zbad", found=stuck))
    aside(good, bad, stage="detection", named="TimeoutError")


def test_all_detections_run_at_the_same_time(monkeypatch):
    """Each waits until all have begun, for less time than it has."""
    begun = threading.Barrier(3)

    def detect(kind):
        return lambda: begun.wait(15) >= 0 and [device(kind)]

    points = [backend_plugin(monkeypatch, k, FakeBackend(k, found=detect(k))) for k in ("a", "b", "c")]
    assert sorted(d.kind for d in Registry(points).devices) == ["a", "b", "c"]


def test_kernels_that_hang(good, stuck, monkeypatch):
    bad = backend_plugin(monkeypatch, "zbad", FakeBackend("zbad", kernels=stuck))
    aside(good, bad, stage="kernels", named="TimeoutError")


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (lambda: sys.exit(1), "SystemExit"),
        ("zbad:0", "it gave 'zbad:0'"),
        ([device("good")], "devices of kind 'zbad'"),
        ([Device("zbad")], "devices of kind 'zbad'"),
    ],
    ids=["exits", "text", "of another", "no architecture"],
)
def test_detection_that_answers_nonsense(good, monkeypatch, found, named):
    bad = backend_plugin(monkeypatch, "zbad", FakeBackend("zbad", found=found))
    aside(good, bad, stage="detection", named=named)


@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        (lambda: sys.exit(1), "SystemExit"),
        (lambda: "fused", "it gave 'fused'"),
        (lambda: 1 / 0, "ZeroDivision"),
    ],
    ids=["exits", "text", "raises"],
)
def test_a_kv_kernel_that_is_none(good, monkeypatch, kernel, named):
    backend = FakeBackend("zbad")
    backend.kv_kernel = kernel
    registry = Registry([good, backend_plugin(monkeypatch, "zbad", backend)])
    with pytest.warns(RuntimeWarning, match="at KV kernel"):
        assert registry.kv_kernel(torch.device("meta")) is None
    assert registry._kv_kernels == {}
    assert [(p.plugin, p.stage) for p in registry.problems] == [("zbad", "KV kernel")]
    assert named in registry.problems[0].error


@pytest.mark.parametrize(
    ("advice", "named"),
    [(lambda: sys.exit(1), "SystemExit"), (lambda: "buy one", "a sequence of str"), (lambda: [3], "[3]")],
    ids=["exits", "text", "numbers"],
)
def test_advice_that_answers_nonsense_is_a_row(good, monkeypatch, advice, named):
    backend = FakeBackend("zbad")
    backend.advice = advice
    registry = Registry([good, backend_plugin(monkeypatch, "zbad", backend)])
    monkeypatch.setattr(doctor, "default_registry", lambda: registry)
    (problem,) = doctor.examine().problems
    assert (problem.plugin, problem.stage) == ("zbad", "advice")
    assert named in problem.error


def test_advice_that_hangs_is_a_row(good, stuck, monkeypatch):
    backend = FakeBackend("zbad")
    backend.advice = stuck
    registry = Registry([good, backend_plugin(monkeypatch, "zbad", backend)])
    monkeypatch.setattr(doctor, "default_registry", lambda: registry)
    data = doctor.doctor_page(doctor.examine()).data
    assert not data["ok"]
    assert "TimeoutError" in data["problems"][0]["error"]


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("kind", ""),
        ("kind", "auto"),
        ("kind", "a:b"),
        ("kind", 3),
        ("torch_type", None),
        ("rank", "first"),
        ("archs", ["a1"]),
        ("archs", {"a1": "Acme"}),
        ("products", {3: arch()}),
    ],
)
def test_attributes_of_a_backend_are_checked(good, monkeypatch, attribute, value):
    backend = FakeBackend("zbad")
    setattr(backend, attribute, value)
    aside(good, backend_plugin(monkeypatch, "zbad", backend), stage="import", named=f"its {attribute} is")


def test_a_kernel_without_a_name(good, monkeypatch):
    bad = backend_plugin(monkeypatch, "zbad", FakeBackend("zbad", kernels=[FakeKernel("")]))
    aside(good, bad, stage="kernels", named="has no name")


def test_an_answer_of_each_and_no_process_ended():
    def ends():
        raise GeneratorExit

    one, two = answers([lambda: 1, ends], 60)
    assert one == 1
    assert "GeneratorExit" in str(two)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_wrong_limit_is_refused(monkeypatch, text):
    monkeypatch.setenv("QUANTPORT_PLUGIN_SECONDS", text)
    with pytest.raises(ConfigError) as caught:
        time_limit()
    check_parts(caught.value, text, "30")


# verdicts


def request():
    return Request(WeightSpec(BUILTIN["int8"], 64, 64), "linear", device())


CLAIM = Claim(Evidence.DECLARED, "acme.example")


@pytest.mark.parametrize(
    ("method", "answer", "named"),
    [
        ("reasons_against", lambda r: sys.exit(1), "SystemExit"),
        ("claim", lambda r: "declared", "its claim is 'declared'"),
        ("claim", lambda r: Claim("declared", "acme.example"), "evidence"),
        ("speed", lambda r: "fast", "its speed is 'fast'"),
        ("speed", lambda r: float("nan"), "its speed is nan"),
        ("slow", lambda r: None, "its slow is None"),
        ("verdict", lambda r: True, "its verdict is True"),
        ("verdict", lambda r: 1 / 0, "ZeroDivisionError"),
        ("verdict", lambda r: Rejected("bad.k", ()), "its reasons are ()"),
        ("verdict", lambda r: Accepted("bad.k", "native", "W8A8", CLAIM, None), "its status is 'native'"),
        ("verdict", lambda r: Accepted("bad.k", Status.NATIVE, None, CLAIM, None), "its precision is None"),
    ],
)
def test_a_verdict_that_raises_or_is_nonsense_is_a_refusal(monkeypatch, method, answer, named):
    bad, fine = FakeKernel("bad.k", quantizes=True), FakeKernel("fine.k", quantizes=True)
    monkeypatch.setattr(bad, method, answer)
    choice = select_kernel(request(), [bad, fine])
    assert choice.kernel == "fine.k"
    refused = choice.verdicts[0]
    assert isinstance(refused, Rejected)
    assert named in refused.reasons[0].text


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (lambda spec: 1 / 0, "ZeroDivisionError"),
        (lambda spec: sys.exit("no"), "SystemExit: no"),
        (lambda spec: "by rows", "it is 'by rows'"),
        (lambda spec: ((64, 64), 1), "it is ((64, 64), 1)"),
    ],
)
def test_a_packed_layout_that_raises_or_is_nonsense_is_an_error_by_name(monkeypatch, layout, named):
    bad = FakeKernel("bad.k", quantizes=True)
    monkeypatch.setattr(bad, "packed_layout", layout)
    backend = FakeBackend("acme", found=[device("acme")], kernels=[bad])
    registry = Registry([backend_plugin(monkeypatch, "acme", backend)])
    with pytest.raises(BackendError) as caught:
        plan(DENSE, "int8", device="acme", registry=registry)
    check_parts(caught.value, "bad.k", "packed layout", named)


def test_doctor_shows_a_verdict_that_is_nonsense(monkeypatch):
    bad, fine = FakeKernel("bad.k"), FakeKernel("fine.k")
    monkeypatch.setattr(bad, "speed", lambda request: "fast")
    backend = FakeBackend("acme", found=[device("acme")], kernels=[bad, fine])
    registry = Registry([backend_plugin(monkeypatch, "acme", backend)])
    monkeypatch.setattr(doctor, "default_registry", lambda: registry)
    (problem,) = doctor.examine().problems
    assert (problem.plugin, problem.stage) == ("bad.k", "verdict")
    assert "its speed is 'fast'" in problem.error


# the command line, in a process where plugins are installed

LOUD = """
import os
import sys

from quantport.backend import Arch, Backend, hookimpl

print("a banner at import")


class Loud(Backend):
    kind, torch_type, archs = "loud", "cpu", {"v1": Arch("loud", "v1", "Loud", frozenset(), "loud.example")}

    def detect(self):
        print("a banner at detection")
        os.system("echo a banner of a tool")
        os.write(1, b"a banner of a library in C\\n")
        return ()

    def kernels(self):
        print("a banner at kernels")
        return ()


@hookimpl
def quantport_backend():
    return Loud()


@hookimpl
def quantport_commands():
    return {"shout": lambda: print("loud")}
"""
EXITS = "import sys\nprint('leaving')\nsys.exit(7)\n"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder of installed distributions, on the path of the processes that a test starts."""

    def install(**plugins):
        for name, text in plugins.items():
            (tmp_path / f"{name}_plugin.py").write_text(text, encoding="utf-8")
            meta = tmp_path / f"{name}-1.dist-info"
            meta.mkdir()
            (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            (meta / "entry_points.txt").write_text(f"[quantport.plugins]\n{name} = {name}_plugin\n")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(p for p in sys.path if p)}")

    return install


def run(*args):
    main = "import sys; sys.argv[0] = 'quantport'; from quantport.cli import main; main()"
    command = [sys.executable, "-c", main, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform == "win32", reason="file descriptors of Unix")
def test_json_stays_json_and_doctor_shows_who_left(installed, monkeypatch):
    installed(loud=LOUD, exits=EXITS)
    for args, code in ((("doctor", "--json"), 1), (("plan", DENSE, "-s", "int8", "--json"), 0)):
        done = run(*args)
        assert done.returncode == code, done.stderr
        data = json.loads(done.stdout)
        assert "a banner at import" in done.stderr
        assert "a banner" not in done.stdout
        if args[0] == "doctor":
            banners = ("a banner at detection", "a banner of a tool", "a banner of a library in C", "leaving")
            assert all(banner in done.stderr for banner in banners)
            (problem,) = data["problems"]
            assert problem["plugin"] == "exits"
            assert "SystemExit: 7" in problem["error"]
    monkeypatch.setenv("QUANTPORT_PLUGIN_SECONDS", "soon")
    done = run("devices", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["type"]) == (2, "ConfigError"), done.stderr
    monkeypatch.delenv("QUANTPORT_PLUGIN_SECONDS")
    done = run("shout")
    assert (done.returncode, done.stdout) == (0, "loud\n"), done.stderr
