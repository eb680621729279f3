"""The suite as a pytest class: every check, once for each kernel, scheme, architecture and dtype of a backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from quantport.device import Device
from quantport.kernel import Kernel
from quantport.scheme import Scheme
from quantport.testing import (
    cases,
    check_backend,
    check_checkpoint,
    check_fakes,
    check_modules,
    check_ops,
    check_runs,
    check_verdicts,
)
from quantport.testing.subject import Subject

_TRACED = ("int8", "fp8_per_channel", "int4_weight_only")  # the graph holds one opaque operator: one scheme of each layout will do


@contextmanager
def _skipping() -> Iterator[None]:
    try:
        yield
    except check_runs.NotHere as reason:
        pytest.skip(str(reason))


class BackendConformance:
    """Subclass it as ``TestSomething`` and set ``kind``; pytest collects the rest.

    Attributes:
        kind: Kind of the backend's devices.
        policy: Phrase in a refusal -> why the kernel would run all the same. Only such refusals may succeed when they are
            called on the device that is here; every other must be a fact.
        stand_in: Where kernels are run, to check their arithmetic, when their device is not here; None to leave that out.
        fakes: Whether ``run`` traces on fake tensors. Kernels that launch code of their own cannot.
    """

    kind: ClassVar[str]
    policy: ClassVar[Mapping[str, str]] = {}
    stand_in: ClassVar[str | None] = "cpu"
    fakes: ClassVar[bool] = True

    @pytest.fixture
    def subject(self) -> Subject:
        """The backend under test."""
        return Subject.installed(self.kind, self.policy, self.stand_in)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Gives each check its kernels, schemes, devices and dtypes."""
        names = [n for n in ("kernel", "scheme", "dtype", "planned", "arch", "layer") if n in metafunc.fixturenames]
        if not names:
            return
        subject = Subject.installed(self.kind, self.policy, self.stand_in)
        traced = tuple(s for s in subject.schemes if s.name in _TRACED)
        values: dict[str, dict[str, Any]] = {
            "kernel": {k.name: k for k in subject.kernels},
            "scheme": {s.name: s for s in (traced if "traced" in metafunc.fixturenames else subject.schemes)},
            "dtype": {cases.FORMAT_OF[d]: d for d in cases.DTYPES},
            "planned": check_verdicts.devices(subject),
            "arch": {d.arch.name: d for d in subject.simulated},
            "layer": {layer: layer for layer in cases.LAYERS},
        }
        for name in names:
            metafunc.parametrize(name, list(values[name].values()), ids=list(values[name]))

    @pytest.fixture
    def traced(self) -> None:
        """Marks the checks that take only a few schemes."""

    def test_architectures(self, subject: Subject) -> None:
        """The table of architectures is well formed."""
        check_backend.check_archs(subject)

    def test_detection(self, subject: Subject) -> None:
        """Detection works here."""
        check_backend.check_detection(subject)

    def test_import_is_light(self, subject: Subject) -> None:
        """Importing the room loads no vendor runtime."""
        check_backend.check_import(subject)

    def test_kernels(self, subject: Subject) -> None:
        """Kernels have names and tolerances."""
        check_backend.check_kernels(subject)

    def test_policy_is_not_stale(self, subject: Subject) -> None:
        """Every phrase of the policy is in some refusal."""
        check_verdicts.check_policy(subject)

    def test_verdicts(self, subject: Subject, planned: Device) -> None:
        """Every kernel answers every request, with reasons or with evidence."""
        check_verdicts.check_verdicts(subject, planned)

    def test_reference(self, subject: Subject, scheme: Scheme) -> None:
        """The devices here quantize to the same bits as the CPU."""
        check_runs.check_reference(subject, scheme)

    def test_accepted_runs(self, subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
        """What is accepted runs, and meets the reference."""
        with _skipping():
            check_runs.check_accepted(subject, kernel, scheme, dtype)

    def test_special_weights(self, subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
        """Zeros, outliers, tiny and huge values."""
        with _skipping():
            check_runs.check_special(subject, kernel, scheme, dtype)

    def test_refused_fails(self, subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
        """What is refused does not work."""
        with _skipping():
            check_runs.check_refused(subject, kernel, scheme)

    def test_packing(self, subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
        """Packing loses nothing."""
        with _skipping():
            check_runs.check_packing(subject, kernel, scheme)

    def test_fakes(self, subject: Subject, arch: Device) -> None:
        """Shapes and dtypes on fake tensors of every architecture."""
        if not self.fakes:
            pytest.skip("the kernels of this backend launch code of their own")
        with _skipping():
            check_fakes.check_fakes(subject, arch)

    def test_forward(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """The modules meet the reference."""
        with _skipping():
            check_modules.check_forward(subject, kernel, scheme, layer)

    def test_copies(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """State dict, deepcopy, pickle."""
        with _skipping():
            check_modules.check_copies(subject, kernel, scheme, layer)

    def test_moves(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """To meta and back."""
        with _skipping():
            check_modules.check_moves(subject, kernel, scheme, layer)

    def test_compile(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str, traced: None) -> None:
        """``torch.compile`` without graph breaks."""
        with _skipping():
            check_ops.check_compile(subject, kernel, scheme, layer)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
    def test_inductor(self, subject: Subject) -> None:
        """Inductor, for one kernel and scheme."""
        with _skipping():
            check_ops.check_compile(subject, subject.kernels[-1], subject.schemes[0], "linear", "inductor")

    def test_opcheck(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str, traced: None) -> None:
        """``torch.library.opcheck``."""
        with _skipping():
            check_ops.check_op(subject, kernel, scheme, layer)

    def test_checkpoint(self, subject: Subject, scheme: Scheme, tmp_path: Path) -> None:
        """Load, save and load again."""
        with _skipping():
            check_checkpoint.check_checkpoint(subject, scheme, tmp_path)
