"""Broken plugins are set aside by name and reason, with one warning, and never stop the others."""

from __future__ import annotations

import pickle
import sys
import warnings
from importlib.metadata import EntryPoint

import pytest
import torch
from core_fakes import FakeBackend, FakeKernel, arch, backend_plugin, device, plugin
from core_references import check_parts

from quantport.device import Device
from quantport.errors import BackendError, ConfigError, DeviceError
from quantport.kernels.base import Request, WeightSpec, guarded_verdict, unrelated_verdicts
from quantport.kernels.verdict import Reason, Rejected
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import Registry
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN

INT8 = Quant("int8", (1, 0))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("QUANTPORT_BACKENDS", raising=False)
    monkeypatch.delenv("QUANTPORT_DEVICE", raising=False)


@pytest.fixture
def good(monkeypatch):
    return backend_plugin(
        monkeypatch, "good", FakeBackend("good", found=[device("good")], kernels=[FakeKernel("good.k")])
    )


def aside(points, plugin_name, stage, *named):
    """A host of these, of which exactly one was set aside, with exactly one warning; the good one works."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry(points)
        found, kernels = registry.devices, registry.kernels("good")
    assert [(w.category, plugin_name in str(w.message)) for w in caught] == [(RuntimeWarning, True)]
    assert len(registry.problems) == 1, registry.problems
    problem = registry.problems[0]
    assert (problem.plugin, problem.stage) == (plugin_name, stage)
    for name in named:
        assert name in problem.error
    assert [d.kind for d in found if d.kind == "good"] == ["good"]
    assert [k.name for k in kernels] == ["good.k"]
    return registry


def test_a_good_one_has_no_problem(good):
    registry = Registry([good])
    assert list(registry.backends) == ["good"]
    assert registry.device().kind == "good"
    assert registry.kernel("good.k").name == "good.k"
    assert registry.problems == []


def test_import_raises(good, monkeypatch):
    aside(
        [EntryPoint("bad", "no_such_module_of_anybody", "quantport.backends"), good],
        "bad",
        "import",
        "ModuleNotFoundError",
    )
    sys.modules.pop("fake_broken", None)


def test_import_of_a_broken_file(good, tmp_path, monkeypatch):
    (tmp_path / "broken_room.py").write_text("raise OSError('libacme.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    registry = aside(
        [EntryPoint("bad", "broken_room", "quantport.backends"), good],
        "bad",
        "import",
        "OSError",
        "libacme.so.1",
    )
    with pytest.raises(DeviceError) as caught:
        registry.device("bad")
    check_parts(caught.value, "'bad'", "libacme.so.1", "good")


def test_hook_raises(good, monkeypatch):
    aside(
        [backend_plugin(monkeypatch, "bad", ValueError("no driver")), good],
        "bad",
        "import",
        "ValueError",
        "no driver",
    )


def test_detection_raises(good, monkeypatch):
    bad = backend_plugin(monkeypatch, "bad", FakeBackend("bad", found=OSError("driver gone")))
    registry = aside([bad, good], "bad", "detection", "OSError", "driver gone")
    assert registry.device("bad:a1").simulated, "planning needs no detection"
    with pytest.raises(DeviceError, match="driver gone"):
        registry.device("bad")


def test_detection_problem_names_the_plugin(good, monkeypatch):
    bad = backend_plugin(
        monkeypatch, "bad", FakeBackend("badkind", found=OSError("driver gone")), entry="acme-plugin"
    )
    aside([bad, good], "acme-plugin", "detection", "driver gone")


def _half(*first):
    yield from first
    raise OSError("driver gone")


@pytest.mark.parametrize(
    "answer",
    [device("bad"), 7, ["bad:0"], [None], lambda: _half(device("bad"))],
    ids=str.split("one number texts none half"),
)
def test_detection_gives_a_wrong_type(good, monkeypatch, answer):
    aside([backend_plugin(monkeypatch, "bad", FakeBackend("bad", found=answer)), good], "bad", "detection")


@pytest.mark.parametrize(
    "answer",
    [RuntimeError("no compiler"), FakeKernel("k"), ["bad.k"], [FakeKernel], lambda: _half(FakeKernel("k"))],
    ids=str.split("raises one texts class half"),
)
def test_kernels_raise_or_give_a_wrong_type(good, monkeypatch, answer):
    registry = aside(
        [backend_plugin(monkeypatch, "bad", FakeBackend("bad", kernels=answer)), good], "bad", "kernels"
    )
    assert registry.kernels("bad") == ()
    with pytest.raises(BackendError) as caught:
        registry.kernel("bad.k")
    check_parts(caught.value, "'bad.k'", "good.k")


@pytest.mark.parametrize("method", ["reasons_against", "claim", "speed", "slow"])
def test_a_kernel_that_raises_is_a_reason(method, monkeypatch):
    kernel = FakeKernel("bad.k", quantizes=True)

    def broken(request):
        raise ZeroDivisionError("tuned table")

    monkeypatch.setattr(kernel, method, broken)
    verdict = guarded_verdict(kernel, Request(WeightSpec(BUILTIN["int8"], 64, 64), "linear", device()))
    assert isinstance(verdict, Rejected)
    assert "ZeroDivisionError: tuned table" in verdict.reasons[0].text


@pytest.mark.parametrize("given", ["N must be even", ("N must be even",), [Reason("N must be even"), None]])
def test_reasons_that_are_texts_are_a_refusal_that_says_what_to_return(given, monkeypatch):
    kernel = FakeKernel("old.k")
    monkeypatch.setattr(kernel, "reasons_against", lambda request: given)
    (reason,) = guarded_verdict(
        kernel, Request(WeightSpec(BUILTIN["int8"], 64, 64), "linear", device())
    ).reasons
    assert repr(given if isinstance(given, str) else given[-1]) in reason.text
    assert "Reason(text, kind)" in reason.text


class OwnFold(FakeKernel):
    """A kernel of a stranger that folds its verdict by itself."""

    def verdict(self, request):
        return Rejected(self.name, (Reason(f"not on {request.device.arch.name}"),))


def test_what_a_kernel_is_not_for_is_known_for_all_devices(monkeypatch):
    """Asked once, it is the verdict on each; what may depend on the device is asked on each."""
    other, raising, experts, fold = FakeKernel("a"), FakeKernel("b"), FakeKernel("c"), OwnFold("d")
    monkeypatch.setattr(raising, "serves", lambda scheme: 1 // 0)
    monkeypatch.setattr(experts, "layers", ("moe",))
    for kernel in (other, fold):
        monkeypatch.setattr(kernel, "serves", lambda scheme: False)
    kernels = [other, raising, experts, fold, FakeKernel("e")]
    request = Request(WeightSpec(BUILTIN["int8"], 64, 64), "linear", device())
    known = unrelated_verdicts(kernels, request.weight.scheme, request.layer)
    assert known == {kernel.name: guarded_verdict(kernel, request) for kernel in (other, experts)}
    choice = select_kernel(request, kernels, known=known)
    assert choice == select_kernel(request, kernels)
    assert [v.kernel for v in choice.verdicts] == [k.name for k in kernels]


def test_two_plugins_of_one_name(good, monkeypatch):
    """pluggy alone would let the second one replace the first one silently."""
    second = backend_plugin(monkeypatch, "zsecond", FakeBackend("other"), entry="good")
    aside([good, second], "good", "import", "a plugin of this name is loaded already", "rename")


def test_two_backends_of_one_kind(good, monkeypatch):
    second = backend_plugin(monkeypatch, "second", FakeBackend("good", kernels=[FakeKernel("second.k")]))
    aside([good, second], "second", "import", "'good'", "kind")


def test_two_kernels_of_one_name(good, monkeypatch):
    """A stranger must not take the name of another room's kernel: saved models look kernels up by name."""
    thief = FakeKernel("good.k")
    points = [good, backend_plugin(monkeypatch, "zthief", FakeBackend("thief", kernels=[thief]))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry(points)
        kernel = registry.kernel("good.k")
    assert kernel is not thief
    assert len(caught) == 1
    assert "good.k" in registry.problems[0].error


@pytest.mark.parametrize("answer", [None, "cpu", FakeBackend, 3], ids=str)
def test_hook_gives_a_wrong_type(good, monkeypatch, answer):
    aside([backend_plugin(monkeypatch, "bad", answer), good], "bad", "import", "Backend")


@pytest.mark.parametrize("attribute", ["kind", "torch_type", "archs"])
def test_backend_without_an_attribute(good, monkeypatch, attribute):
    backend = FakeBackend("bad")
    delattr(backend, attribute)
    aside([backend_plugin(monkeypatch, "bad", backend), good], "bad", "import", attribute)


def test_backend_without_the_hook(good, monkeypatch):
    aside([plugin(monkeypatch, "bad"), good], "bad", "import", "no quantport_backend hook")


def test_schemes_of_plugins(good, monkeypatch):
    mine = Scheme("mine", INT8, None, "", ("my",))
    registry = Registry(
        [plugin(monkeypatch, "extra", "quantport.plugins", quantport_schemes=lambda: [mine]), good]
    )
    assert registry.schemes["my"] is mine
    assert "mine" not in BUILTIN


@pytest.mark.parametrize(
    "schemes",
    [[Scheme("new", INT8, None, "", ("fp8",))], [Scheme("int8", INT8, None, "")], None, ["a"]],
    ids=str.split("alias name none text"),
)
def test_scheme_that_clashes_sets_the_whole_plugin_aside(good, monkeypatch, schemes):
    backend = FakeBackend("bad")
    bad = plugin(
        monkeypatch,
        "bad",
        "quantport.plugins",
        quantport_schemes=lambda: schemes,
        quantport_backend=lambda: backend,
    )
    registry = aside([good, bad], "bad", "import")
    assert set(registry.schemes) == set(BUILTIN)
    assert "bad" not in registry.backends


def test_restriction(good, monkeypatch):
    other = backend_plugin(monkeypatch, "other", FakeBackend("other"))
    assert list(Registry([good, other], only=["good"]).backends) == ["good"]
    monkeypatch.setenv("QUANTPORT_BACKENDS", " other, ")
    assert list(Registry([good, other]).backends) == ["other"]
    monkeypatch.setenv("QUANTPORT_BACKENDS", "othr")
    with pytest.raises(ConfigError) as caught:
        Registry([good, other])
    check_parts(caught.value, "QUANTPORT_BACKENDS", "'othr'", "did you mean 'other'", "good")


def test_restriction_does_not_import_the_rest(good, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTPORT_BACKENDS", "good")
    registry = Registry([good, EntryPoint("bad", "no_such_module_of_anybody", "quantport.backends")])
    assert registry.problems == []


def test_detection_is_lazy_and_happens_once(monkeypatch):
    calls = []
    backend = FakeBackend("lazy", found=lambda: calls.append(1) or [device("lazy")])
    registry = Registry([backend_plugin(monkeypatch, "lazy", backend)])
    assert calls == []
    assert registry.devices == registry.devices
    assert calls == [1]


def test_problems_warn_once(monkeypatch):
    registry = Registry([backend_plugin(monkeypatch, "bad", FakeBackend("bad", found=OSError("gone")))])
    with pytest.warns(RuntimeWarning, match="gone"):
        assert registry.devices == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.devices == ()
    with pytest.raises(DeviceError) as caught:
        registry.device("auto")
    check_parts(caught.value, "'auto'", "no backend found a device", "doctor")


@pytest.fixture
def registry(monkeypatch):
    fast = FakeBackend(
        "fast", "xpu", 10, [device("fast", 0, torch_type="xpu"), device("fast", 1, torch_type="xpu")]
    )
    slow = FakeBackend("slow", "cpu", 0, [device("slow")])
    return Registry([backend_plugin(monkeypatch, "slow", slow), backend_plugin(monkeypatch, "fast", fast)])


def test_device_auto_takes_the_highest_rank(registry, monkeypatch):
    assert str(registry.device()) == "fast:0 (a1)"
    monkeypatch.setenv("QUANTPORT_DEVICE", "slow")
    assert registry.device().kind == "slow"
    assert registry.device("fast:1").index == 1, "device= wins over the environment"
    monkeypatch.setenv("QUANTPORT_DEVICE", "fsat")
    with pytest.raises(DeviceError, match="did you mean 'fast'"):
        registry.device()


def test_device_forms(registry):
    given = device("elsewhere")
    assert registry.device(given) is given
    assert registry.device("fast").index == 0
    simulated = registry.device("fast:a2")
    assert (simulated.simulated, simulated.torch_type, simulated.memory, str(simulated)) == (
        True,
        "xpu",
        None,
        "fast:a2",
    )
    assert registry.device("fast:1").torch_device == torch.device("xpu:1")
    assert registry.device("slow").torch_device == torch.device("cpu")


@pytest.mark.parametrize(
    "name", ["Toy 2000", "toy2000", "TOY-2000", "toy 2000 16GB", "Toy_2000-80-GiB", "fast:toy 2000"]
)
def test_a_product_is_its_architecture(registry, name):
    registry.backends["fast"].products = {"Toy 2000": arch("fast", "a2")}
    found = registry.device(name)
    assert (str(found), found.simulated, found.torch_type) == ("fast:a2", True, "xpu")
    for other in ("toy 200", "toy 2000 ti", "slow:toy 2000", "2000"):
        with pytest.raises(DeviceError):
            registry.device(other)


def test_a_product_that_is_nearly_right(registry):
    registry.backends["fast"].products = {"Toy 2000": arch("fast", "a2")}
    with pytest.raises(DeviceError) as caught:
        registry.device("Toy 2001")
    check_parts(caught.value, "'Toy 2001'", "did you mean 'Toy 2000'", "full name")


def test_kinds_and_architectures_in_upper_case(registry):
    assert str(registry.device("FAST:1")) == "fast:1 (a1)"
    assert str(registry.device("Fast:A2")) == "fast:a2"


def test_device_from_a_torch_device(registry):
    """torch names devices by torch_type ("cuda" on ROCm too), rooms by kind."""
    assert str(registry.device(torch.device("xpu", 1))) == "fast:1 (a1)"
    assert registry.device(torch.device("cpu")).kind == "slow"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("fsat", ["'fsat'", "did you mean 'fast'", "slow"]),
        ("fast:a3", ["'fast:a3'", "'a3'", "fast:a1", "fast:a2"]),
        ("fast:7", ["'fast:7'", "2 such devices", "fast:a1"]),
        ("fast:²", ["fast:²"]),
        ("", ["known"]),
        ("fast:" + "9" * 5000, ["fast:999", "fast:a1"]),
        ("a1", ["'a1'", "several architectures", "fast:a1", "slow:a1"]),
        ("toaster", ["'toaster'", "no backend has this kind", "product", "fast", "slow"]),
    ],
)
def test_device_errors(registry, asked, named):
    with pytest.raises(DeviceError) as caught:
        registry.device(asked)
    check_parts(caught.value, *named)


def test_devices_are_values():
    found = Device(arch(), 1, "Acme", 3, "cpu", features=frozenset({"x"}))
    assert pickle.loads(pickle.dumps(found)) == found
    assert hash(found) == hash(pickle.loads(pickle.dumps(found)))
    assert arch(native=("fp16",)).compute is torch.float16
    assert arch(native=("fp16", "bf16")).compute is torch.bfloat16
    assert arch(native=()).compute is torch.bfloat16
