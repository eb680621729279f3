"""The suite as a pytest class: every check, once for each kernel, scheme, architecture and dtype of a backend."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from quantport import aten
from quantport.device import Device
from quantport.kernel import Kernel
from quantport.scheme import Scheme
from quantport.testing import (
    cases,
    check_backend,
    check_checkpoint,
    check_fakes,
    check_grouped,
    check_modules,
    check_ops,
    check_runs,
    check_verdicts,
)
from quantport.testing.subject import Subject

_SHARED = {type(kernel) for kernel in aten.portable()}
_MISSING = ("no device of kind", "makes no fake tensors", "does not run on")


@contextmanager
def _checking(threads: int | None = 1) -> Iterator[None]:
    """Skips what needs a device that is not here; what a kernel rightly declines needs no check.

    One thread, since the tensors are small and two cost more than they bring.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    except check_runs.NotHere as reason:
        if any(phrase in str(reason) for phrase in _MISSING):
            pytest.skip(str(reason))
    finally:
        torch.set_num_threads(before)


class BackendConformance:
    """Subclass it as ``TestSomething`` and set ``kind``; pytest collects the rest.

    Attributes:
        kind: Kind of the backend's devices.
        policy: Phrase in a refusal -> why the kernel would run all the same. Only such refusals may succeed when they are
            called on the device that is here; every other must be a fact.
        stand_in: Where kernels are run, to check their arithmetic, when their device is not here; None to leave that out.
        stands_for: Kernel -> the only schemes that it is checked with: where it runs slowly here, and its other schemes take the
            same paths. Verdicts are asked for every scheme all the same.
        fakes: Whether ``run`` traces on fake tensors. Kernels that launch code of their own cannot.
    """

    kind: ClassVar[str]
    policy: ClassVar[Mapping[str, str]] = {}
    stand_in: ClassVar[str | None] = "cpu"
    stands_for: ClassVar[Mapping[str, Collection[str]]] = {}
    fakes: ClassVar[bool] = True

    @pytest.fixture
    def subject(self) -> Subject:
        """The backend under test."""
        return Subject.installed(self.kind, self.policy, self.stand_in)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Gives each check its kernels with the schemes that they serve, and its devices, dtypes and layers."""
        wanted = set(metafunc.fixturenames)
        if not wanted & {"kernel", "scheme", "dtype", "planned", "arch", "layer"}:
            return
        subject = Subject.installed(self.kind, self.policy, self.stand_in)
        schemes = subject.schemes
        if "kernel" in wanted:
            pairs = [(k, s) for k in subject.kernels for s in schemes if k.serves(s)]
            pairs = [(k, s) for k, s in pairs if s.name in self.stands_for.get(k.name, (s.name,))]
            if not subject.here:  # the shared kernels are tested where they run; here one scheme shows that they are offered
                pairs = [(k, s) for k, s in pairs if type(k) not in _SHARED or s is next(t for t in schemes if k.serves(t))]
            if "traced" in wanted:  # the graph holds one opaque operator: the first scheme of a kernel will do
                pairs = list({k.name: (k, s) for k, s in reversed(pairs)}.values())[::-1]
            metafunc.parametrize(("kernel", "scheme"), pairs, ids=[f"{k.name}-{s.name}" for k, s in pairs])
            wanted -= {"kernel", "scheme"}
        values: dict[str, dict[str, Any]] = {
            "scheme": {s.name: s for s in schemes},
            "dtype": {cases.FORMAT_OF[d]: d for d in cases.DTYPES},
            "planned": check_verdicts.devices(subject),
            "arch": {d.arch.name: d for d in subject.simulated},
            "layer": {layer: layer for layer in cases.LAYERS},
        }
        for name in sorted(wanted & set(values)):
            metafunc.parametrize(name, list(values[name].values()), ids=list(values[name]))

    @pytest.fixture
    def traced(self) -> None:
        """Marks the checks that take one scheme of each kernel."""

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
        with _checking(threads=None):
            check_runs.check_reference(subject, scheme)

    def test_accepted_runs(self, subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
        """What is accepted runs, and meets the reference."""
        with _checking():
            check_runs.check_accepted(subject, kernel, scheme, dtype)

    def test_special_weights(self, subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype) -> None:
        """Zeros, outliers, tiny and huge values."""
        with _checking(threads=None):
            check_runs.check_special(subject, kernel, scheme, dtype)

    def test_refused_fails(self, subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
        """What is refused does not work."""
        with _checking():
            check_runs.check_refused(subject, kernel, scheme)

    def test_packing(self, subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
        """Packing loses nothing."""
        with _checking():
            check_runs.check_packing(subject, kernel, scheme)

    def test_fakes(self, subject: Subject, arch: Device) -> None:
        """Shapes and dtypes on fake tensors of every architecture."""
        if not self.fakes:
            pytest.skip("the kernels of this backend launch code of their own")
        with _checking():
            check_fakes.check_fakes(subject, arch)

    def test_forward(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """The modules meet the reference."""
        with _checking(threads=None):
            check_modules.check_forward(subject, kernel, scheme, layer)

    def test_grouped(self, subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
        """Groups of rows meet the reference of their own weights."""
        with _checking(threads=None):
            check_grouped.check_grouped(subject, kernel, scheme)

    def test_copies(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """State dict, deepcopy, pickle."""
        with _checking():
            check_modules.check_copies(subject, kernel, scheme, layer)

    def test_moves(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """To meta and back."""
        with _checking():
            check_modules.check_moves(subject, kernel, scheme, layer)

    def test_compile(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str, traced: None) -> None:
        """``torch.compile`` without graph breaks."""
        with _checking():
            check_ops.check_compile(subject, kernel, scheme, layer)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
    def test_inductor(self, subject: Subject) -> None:
        """Inductor, for one kernel and scheme."""
        with _checking():
            check_ops.check_compile(subject, subject.kernels[-1], subject.schemes[0], "linear", "inductor")

    def test_opcheck(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str, traced: None) -> None:
        """``torch.library.opcheck``."""
        with _checking():
            check_ops.check_op(subject, kernel, scheme, layer)

    def test_checkpoint(self, subject: Subject, scheme: Scheme, tmp_path: Path) -> None:
        """Load, save and load again."""
        with _checking():
            check_checkpoint.check_checkpoint(subject, scheme, tmp_path)
