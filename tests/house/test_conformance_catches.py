"""The conformance suite passes a right backend and fails each kind of wrong one."""

from __future__ import annotations

from dataclasses import replace

import house_toys as toys
import pytest

from quantport.backend import Arch, Device
from quantport.testing import check_backend, check_fakes, check_runs, check_verdicts

ACCEPTED = [toys.WrongScale, toys.WrongRow, toys.AcceptsWhatRaises, toys.WrongDtype, toys.ForgetsBias, toys.WritesActivations]
VERDICTS = [
    toys.RaisesInReasons, toys.NoReasons, toys.EmptyReason, toys.NoSource, toys.MeasuredNowhere, toys.KnowsOneArch
]  # fmt: skip


def verdicts(subject):
    for device in check_verdicts.devices(subject).values():
        check_verdicts.check_verdicts(subject, device)


def test_a_right_backend_passes():
    subject = toys.subject()
    (kernel,) = subject.kernels
    check_backend.check_archs(subject)
    check_backend.check_detection(subject)
    check_backend.check_kernels(subject)
    check_verdicts.check_policy(subject)
    check_runs.check_accepted(subject, kernel, toys.SCHEME, toys.BF16)
    check_runs.check_special(subject, kernel, toys.SCHEME, toys.BF16)
    check_runs.check_refused(subject, kernel, toys.SCHEME)
    check_runs.check_packing(subject, kernel, toys.SCHEME)


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


def test_a_refusal_that_would_succeed():
    kernel = toys.RefusesWhatWorks()
    with pytest.raises(AssertionError, match="it is Monday"):
        check_runs.check_refused(toys.subject(kernel), kernel, toys.SCHEME)


def test_a_refusal_of_policy_is_let_through_and_must_not_be_stale():
    kernel = toys.RefusesWhatWorks()
    subject = toys.subject(kernel, policy={"it is Monday": "it rests on Mondays"})
    check_runs.check_refused(subject, kernel, toys.SCHEME)
    check_verdicts.check_policy(subject)
    with pytest.raises(AssertionError, match="says so any more"):
        check_verdicts.check_policy(replace(subject, policy={"it is Sunday": "it rests"}))
    with pytest.raises(AssertionError, match="has no reason"):
        check_verdicts.check_policy(replace(subject, policy={"it is Monday": ""}))


@pytest.mark.parametrize("broken", [toys.LosesBits, toys.LosesScaleShape])
def test_an_unpack_that_is_no_inverse(broken):
    with pytest.raises(AssertionError, match="unpack gives another"):
        check_runs.check_packing(toys.subject(broken()), broken(), toys.SCHEME)


@pytest.mark.parametrize("broken", VERDICTS)
def test_a_verdict_that_breaks_the_contract(broken):
    with pytest.raises(AssertionError, match=r"toy\.int8, int8"):
        verdicts(toys.subject(broken()))


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
    "wrong", [{"title": ""}, {"source": " "}, {"kind": "other"}, {"name": "crate"}, {"native": frozenset({"int3"})}]
)
def test_an_architecture_that_is_not_well_formed(wrong):
    with pytest.raises(AssertionError, match="architectures of toy"):
        check_backend.check_archs(toys.subject(archs={"box": replace(toys.ARCH, **wrong)}))


def test_fakes_find_a_wrong_dtype():
    subject = toys.subject(toys.WrongDtype(), detect=lambda: ())
    with pytest.raises(AssertionError, match="run gives"):
        check_fakes.check_fakes(subject, subject.simulated[0])
    subject = toys.subject(detect=lambda: ())
    check_fakes.check_fakes(subject, subject.simulated[0])


def test_a_kernel_whose_device_is_elsewhere_is_judged_on_the_stand_in():
    subject = toys.subject(toys.WrongScale(), detect=lambda: ())
    with pytest.raises(AssertionError, match="relative error"):
        check_runs.check_accepted(subject, toys.WrongScale(), toys.SCHEME, toys.BF16)
    with pytest.raises(check_runs.NotHere):
        check_runs.check_accepted(replace(subject, stand_in=None), toys.Toy(), toys.SCHEME, toys.BF16)
