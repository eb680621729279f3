"""The conformance suite passes a right backend and fails each kind of wrong one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import house_toys as toys
import pytest

from quantport.backend import Arch, Device, Evidence, Refusal
from quantport.testing import cases, check_backend, check_fakes, check_refused, check_runs, check_verdicts
from quantport.testing.apart import Apart
from quantport.testing.subject import NotHere, Subject, alone

ACCEPTED = [
    toys.WrongScale,
    toys.WrongRow,
    toys.AcceptsWhatRaises,
    toys.WrongDtype,
    toys.ForgetsBias,
    toys.WritesActivations,
    toys.LeavesTransposed,
]
VERDICTS = [
    toys.RaisesInReasons,
    toys.NoReasons,
    toys.EmptyReason,
    toys.TextReasons,
    toys.NoKind,
    toys.NoSource,
    toys.KnowsOneArch,
]


@pytest.fixture(scope="module")
def apart():
    """A process for refused calls, which waits two seconds for each."""
    with Apart(limit=2.0) as process:
        yield process


def verdicts(subject):
    for device in check_verdicts.devices(subject).values():
        check_verdicts.check_verdicts(subject, device)


def test_a_right_backend_passes(apart):
    subject = toys.subject()
    (kernel,) = subject.kernels
    check_backend.check_archs(subject)
    check_backend.check_detection(subject)
    check_backend.check_kernels(subject)
    check_runs.check_accepted(subject, kernel, toys.SCHEME, toys.BF16)
    check_runs.check_special(subject, kernel, toys.SCHEME, toys.BF16)
    check_refused.check_refused(subject, kernel, toys.SCHEME, apart)
    check_runs.check_packing(subject, kernel, toys.SCHEME)
    assert [check.compared > 0 for check in subject.record] == [True] * 7


def test_a_check_that_compares_nothing_does_not_pass(monkeypatch):
    subject = toys.subject()
    with pytest.raises(AssertionError, match="nothing was compared"):
        subject.conclude("a check of nothing", 0, [])
    monkeypatch.setattr(cases, "specials", lambda scheme: [])
    for check, dtypes in ((check_runs.check_special, [toys.BF16]), (check_runs.check_packing, [])):
        with pytest.raises(AssertionError, match="nothing was compared"):
            check(subject, toys.Toy(), toys.SCHEME, *dtypes)
    assert subject.record == []


def test_right_verdicts_pass():
    subject = toys.subject()
    check_verdicts.check_verdicts(subject, subject.here[0])


@pytest.mark.parametrize("broken", ACCEPTED)
def test_an_accepted_request_that_is_wrong(broken):
    with pytest.raises(AssertionError, match=r"toy\.int8 accepts int8"):
        check_runs.check_accepted(toys.subject(broken()), broken(), toys.SCHEME, toys.BF16)


def test_special_weights_find_a_wrong_scale():
    with pytest.raises(AssertionError, match="special weights"):
        check_runs.check_special(toys.subject(toys.WrongScale()), toys.WrongScale(), toys.SCHEME, toys.BF16)


def test_a_refusal_that_would_succeed(apart):
    kernel = toys.RefusesWhatWorks()
    with pytest.raises(AssertionError, match="it is Monday"):
        check_refused.check_refused(toys.subject(kernel), kernel, toys.SCHEME, apart)


@pytest.mark.parametrize("kernel", [toys.RefusesTooMuch(), toys.RefusesHalf()])
def test_a_refusal_that_is_untrue_of_some_multiples_only(kernel, apart):
    with pytest.raises(AssertionError, match="must be a multiple of"):
        check_refused.check_refused(toys.subject(kernel), kernel, toys.SCHEME, apart)


@pytest.mark.parametrize("kind", [Refusal.UNSAFE, Refusal.SLOWER, Refusal.NOT_OFFERED])
def test_only_what_is_impossible_is_put_to_the_test(kind, apart, monkeypatch):
    kernel = toys.RefusesWhatWorks()
    assert 256 in {r.weight.k for r, _ in check_refused.refused(toys.subject(kernel), kernel, toys.SCHEME)}
    monkeypatch.setattr(toys.RefusesWhatWorks, "kind", kind)
    subject = toys.subject(kernel)
    assert {r.weight.n % 2 for r, _ in check_refused.refused(subject, kernel, toys.SCHEME)} == {1}
    check_refused.check_refused(subject, kernel, toys.SCHEME, apart)


@pytest.mark.parametrize(
    ("kernel", "end"), [(toys.Aborts(), signal.SIGABRT.name), (toys.Hangs(), "took longer than 2 s")]
)
def test_a_refused_call_that_crashes_or_hangs_is_rightly_refused(kernel, end, apart):
    subject = toys.subject(kernel)
    check_refused.check_refused(subject, kernel, toys.SCHEME, apart)
    (check,) = subject.record
    assert 0 < len(check.notes) <= check_refused.ENDS
    assert all(end in note for note in check.notes)


def test_a_crash_stops_neither_the_tests_nor_the_next_call(apart):
    kernel = toys.Crashes()
    with pytest.raises(AssertionError, match="it is Monday"):
        check_refused.check_refused(toys.subject(kernel), kernel, toys.SCHEME, apart)


def test_a_process_that_does_not_start_is_no_proof():
    kernel = toys.Toy()
    with Apart(2.0, "house_toys:nowhere") as broken, pytest.raises(RuntimeError, match="nowhere"):
        check_refused.check_refused(toys.subject(kernel), kernel, toys.SCHEME, broken)


@pytest.mark.parametrize("broken", [toys.LosesBits, toys.LosesScaleShape])
def test_an_unpack_that_is_no_inverse(broken):
    with pytest.raises(AssertionError, match="unpack gives another"):
        check_runs.check_packing(toys.subject(broken()), broken(), toys.SCHEME)


@pytest.mark.parametrize("broken", VERDICTS)
def test_a_verdict_that_breaks_the_contract(broken):
    with pytest.raises(AssertionError, match=r"toy\.int8, int8"):
        verdicts(toys.subject(broken()))


def test_reasons_that_are_no_values_of_reason_say_what_they_must_be():
    for broken in (toys.TextReasons, toys.NoKind):
        with pytest.raises(AssertionError, match=r"Reason\(text, kind\)"):
            verdicts(toys.subject(broken()))


@pytest.mark.parametrize(
    ("evidence", "proof"), [(Evidence.MEASURED, toys.RESULTS), (Evidence.COMPILED, toys.CODE)]
)
def test_evidence_that_is_there_of_one_architecture(evidence, proof):
    subject = toys.subject(toys.Claims(evidence, proof))
    check_verdicts.check_verdicts(subject, subject.here[0])
    with pytest.raises(AssertionError, match=r"'unheard_of'"):
        check_verdicts.check_verdicts(subject, check_verdicts.devices(subject)["unheard_of"])


@pytest.mark.parametrize(
    ("evidence", "proof", "found"),
    [
        (Evidence.MEASURED, None, "needs a Measurement"),
        (Evidence.MEASURED, toys.CODE, "needs a Measurement"),
        (Evidence.MEASURED, replace(toys.RESULTS, commit=""), "names no commit"),
        (
            Evidence.MEASURED,
            replace(toys.RESULTS, file="tests/house/no_such_file.json"),
            "neither in an installed package",
        ),
        (
            Evidence.MEASURED,
            replace(toys.RESULTS, file="nowhere/results.json"),
            "neither in an installed package",
        ),
        (Evidence.MEASURED, replace(toys.RESULTS, device="another toy"), "does not say 'another toy'"),
        (
            Evidence.MEASURED,
            replace(toys.RESULTS, file="benchmarks/results/linear-x86_vnni.md"),
            "says nothing of 'toy.int8'",
        ),
        (Evidence.COMPILED, None, "needs a MachineCode"),
        (Evidence.COMPILED, replace(toys.CODE, compiler=" "), "names no compiler"),
        (Evidence.COMPILED, replace(toys.CODE, version="", instruction=""), "names no version, instruction"),
        (
            Evidence.COMPILED,
            replace(toys.CODE, instruction="TMMA.32x32"),
            "says nothing of 'box' with 'TMMA.32x32'",
        ),
    ],
)
def test_evidence_that_is_not_there(evidence, proof, found):
    subject = toys.subject(toys.Claims(evidence, proof))
    with pytest.raises(AssertionError, match=found):
        check_verdicts.check_verdicts(subject, subject.here[0])


def test_a_status_of_native_needs_the_format():
    with pytest.raises(AssertionError, match="does not list int8"):
        verdicts(toys.subject(archs={"box": replace(toys.ARCH, native=frozenset({"fp16"}))}))


def test_a_tolerance_that_allows_anything_and_names_that_repeat():
    with pytest.raises(AssertionError, match="tolerance"):
        check_backend.check_kernels(toys.subject(toys.Careless()))
    with pytest.raises(AssertionError, match="two kernels are named"):
        check_backend.check_kernels(toys.subject(toys.Toy(), toys.WrongScale()))


def test_a_detection_that_raises_is_found_and_does_not_stop_the_host():
    subject = toys.subject(detect=toys.raising_detect)
    with pytest.raises(AssertionError, match="no driver"):
        check_backend.check_detection(subject)
    assert subject.here == ()


def test_a_detection_that_hangs_is_found_and_stops_no_test():
    subject = Subject(alone(toys.HangingBackend()), "toy", limit=0.5)
    with pytest.raises(AssertionError, match="hangs"):
        check_backend.check_detection(subject)
    with pytest.raises(AssertionError, match="hangs"):
        check_backend.check_import(subject)
    # In a process of its own, since the thread that hangs holds the lock of ``cached_property`` before Python
    # 3.12.
    asks = "import house_toys as t; t.Subject(t.alone(t.HangingBackend()), 'toy', limit=0.5).here"
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", asks],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 1
    assert "AssertionError: detection of toy hangs" in done.stderr


@pytest.mark.parametrize(
    "found",
    [
        Device(Arch("other", "box", "t", frozenset(), "s")),
        Device(toys.ARCH, torch_type="cuda"),
        Device(toys.ARCH, simulated=True),
        Device(toys.ARCH, memory=0),
        Device(replace(toys.ARCH, native=frozenset({"int8", "bf16"}))),
    ],
)
def test_a_found_device_that_is_not_right(found):
    with pytest.raises(AssertionError, match="detection of toy"):
        check_backend.check_detection(toys.subject(detect=lambda: (found,)))


@pytest.mark.parametrize(
    "wrong",
    [{"title": ""}, {"source": " "}, {"kind": "other"}, {"name": "crate"}, {"native": frozenset({"int3"})}],
)
def test_an_architecture_that_is_not_well_formed(wrong):
    with pytest.raises(AssertionError, match="architectures of toy"):
        check_backend.check_archs(toys.subject(archs={"box": replace(toys.ARCH, **wrong)}))


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("broken", [toys.WrongDtype, toys.WrongFake])
def test_fakes_find_a_wrong_dtype_or_shape_be_a_device_here_or_not(broken, here):
    def subject(kernel):
        return toys.subject(kernel) if here else toys.subject(kernel, detect=lambda: ())

    with pytest.raises(AssertionError, match="run gives"):
        check_fakes.check_fakes(subject(broken()), subject(broken()).simulated[0])
    check_fakes.check_fakes(subject(toys.Toy()), subject(toys.Toy()).simulated[0])


def test_a_kernel_whose_device_is_elsewhere_is_judged_on_the_stand_in():
    subject = toys.subject(toys.WrongScale(), detect=lambda: ())
    with pytest.raises(AssertionError, match="relative error"):
        check_runs.check_accepted(subject, toys.WrongScale(), toys.SCHEME, toys.BF16)
    with pytest.raises(NotHere):
        check_runs.check_accepted(replace(subject, stand_in=None), toys.Toy(), toys.SCHEME, toys.BF16)
