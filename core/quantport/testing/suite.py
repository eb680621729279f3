"""The suite as a pytest class: every check, once for each kernel, scheme, architecture and dtype that there
is to check.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from quantport.device import Device
from quantport.kernels.base import Kernel
from quantport.scheme import Scheme
from quantport.testing import (
    cases,
    check_backend,
    check_checkpoint,
    check_fakes,
    check_grouped,
    check_modules,
    check_ops,
    check_refused,
    check_runs,
    check_verdicts,
)
from quantport.testing.apart import Apart, setting_of
from quantport.testing.offer import Offer, first
from quantport.testing.subject import NotHere, Subject


@contextmanager
def checking(subject: Subject, threads: int | None = 1) -> Iterator[None]:
    """Skips what needs something that is not here, and fails what compares nothing.

    One thread, since the tensors are small and two cost more than they bring.
    """
    before, checks = torch.get_num_threads(), len(subject.record)
    torch.set_num_threads(threads or before)
    try:
        yield
    except NotHere as reason:
        pytest.skip(str(reason))
    finally:
        torch.set_num_threads(before)
    assert len(subject.record) > checks, "this test checked nothing"


class BackendConformance:
    """Subclass it as ``TestSomething`` and set ``kind``; pytest collects the rest.

    Attributes:
        kind: Kind of the backend's devices.
        every_kernel: Whether the shared kernels of torch operators, and the schemes that only they serve, are
            all checked. By default they stand for themselves with one scheme each, and the kernels of the
            backend have them all.
        stand_in: Where kernels are run, to check their arithmetic, when their device is not here; None to
            leave that out.
        setting: ``module:function`` of a context manager in which devices are here that are not: a simulator.
            Tests are collected and run in it, and so are refused calls.
        stands_for: Kernel -> the only schemes that it is checked with: where it runs slowly here, and its
            other schemes take the same paths. Verdicts are asked for every scheme all the same.
        fakes: Whether ``run`` traces on fake tensors. Kernels that launch code of their own cannot.
        limit: Seconds that detection, or one refused call, may take.
    """

    kind: ClassVar[str]
    every_kernel: ClassVar[bool] = False
    stand_in: ClassVar[str | None] = "cpu"
    setting: ClassVar[str] = ""
    stands_for: ClassVar[Mapping[str, Collection[str]]] = {}
    fakes: ClassVar[bool] = True
    limit: ClassVar[float] = 60.0

    @classmethod
    @cache
    def offer(cls) -> Offer:
        """What there is to check."""
        with setting_of(cls.setting):
            return Offer.of(
                Subject.installed(cls.kind, cls.stand_in, cls.limit), cls.every_kernel, cls.stands_for
            )

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Gives each check what there is to check; two that take the same parameters are told apart by
        fixtures that mark them.
        """
        wanted = set(metafunc.fixturenames)
        if "kernel" in wanted:
            columns, rows = self._rows(wanted)
            metafunc.parametrize(columns, rows, ids=["-".join(map(_id, row)) for row in rows])
        elif wanted & {"scheme", "planned", "arch"}:
            subject = self.offer().subject
            values: dict[str, dict[str, Any]] = {
                "scheme": {s.name: s for s in self.offer().schemes},
                "planned": check_verdicts.devices(subject),
                "arch": {d.arch.name: d for d in subject.simulated},
            }
            for name in sorted(wanted & set(values)):
                metafunc.parametrize(name, list(values[name].values()), ids=list(values[name]))

    def _rows(self, wanted: Collection[str]) -> tuple[tuple[str, ...], Sequence[tuple[Any, ...]]]:
        offer = self.offer()
        if "dtype" in wanted:
            return ("kernel", "scheme", "dtype"), offer.accepted
        if "layer" in wanted:  # a graph holds one opaque operator: the first scheme of a kernel will do
            rows = [row for layer in cases.LAYERS for row in first(r for r in offer.layers if r[2] == layer)]
            return ("kernel", "scheme", "layer"), rows if "traced" in wanted else offer.layers
        if "experts" in wanted:
            return ("kernel", "scheme"), [
                (kernel, scheme) for kernel, scheme, layer in offer.layers if layer == "moe"
            ]
        return ("kernel", "scheme"), offer.refused if "apart" in wanted else offer.packed

    @pytest.fixture
    def subject(self) -> Iterator[Subject]:
        """The backend under test."""
        with setting_of(self.setting):
            yield Subject.installed(self.kind, self.stand_in, self.limit)

    @pytest.fixture(autouse=True)
    def checked(self, subject: Subject, request: pytest.FixtureRequest) -> Iterator[None]:
        """Reports with each test how much it compared (``checked``), and what is worth telling (``note``)."""
        yield
        told = request.node.user_properties
        told.append(("checked", sum(check.compared for check in subject.record)))
        told += [("note", note) for check in subject.record for note in check.notes]

    @pytest.fixture(scope="class")
    @classmethod
    def apart(cls) -> Iterator[Apart]:
        """The process in which refused calls are made."""
        with Apart(cls.limit, cls.setting) as process:
            yield process

    @pytest.fixture
    def traced(self) -> None:
        """Marks the checks that take one scheme of each kernel."""

    @pytest.fixture
    def experts(self) -> None:
        """Marks the checks of what takes experts."""

    def test_architectures(self, subject: Subject) -> None:
        """The table of architectures is well formed."""
        with checking(subject):
            check_backend.check_archs(subject)

    def test_detection(self, subject: Subject) -> None:
        """Detection works here, and soon."""
        with checking(subject):
            check_backend.check_detection(subject)

    def test_import_is_light(self, subject: Subject) -> None:
        """Importing the room loads no vendor runtime."""
        with checking(subject):
            check_backend.check_import(subject)

    def test_kernels(self, subject: Subject) -> None:
        """Kernels have names and tolerances."""
        with checking(subject):
            check_backend.check_kernels(subject)

    def test_verdicts(self, subject: Subject, planned: Device) -> None:
        """Every kernel answers every request, with reasons or with evidence that is there."""
        with checking(subject):
            check_verdicts.check_verdicts(subject, planned)

    def test_reference(self, subject: Subject, scheme: Scheme) -> None:
        """The devices here quantize to the same bits as the CPU."""
        with checking(subject, threads=None):
            check_runs.check_reference(subject, scheme)

    def test_accepted_runs(
        self, subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype
    ) -> None:
        """What is accepted runs, and meets the reference."""
        with checking(subject):
            check_runs.check_accepted(subject, kernel, scheme, dtype)

    def test_special_weights(
        self, subject: Subject, kernel: Kernel, scheme: Scheme, dtype: torch.dtype
    ) -> None:
        """Zeros, outliers, tiny and huge values."""
        with checking(subject, threads=None):
            check_runs.check_special(subject, kernel, scheme, dtype)

    def test_refused_fails(self, subject: Subject, kernel: Kernel, scheme: Scheme, apart: Apart) -> None:
        """What is said to be impossible does not work."""
        with checking(subject):
            check_refused.check_refused(subject, kernel, scheme, apart)

    def test_packing(self, subject: Subject, kernel: Kernel, scheme: Scheme) -> None:
        """Packing loses nothing."""
        with checking(subject):
            check_runs.check_packing(subject, kernel, scheme)

    def test_fakes(self, subject: Subject, arch: Device) -> None:
        """Shapes and dtypes on fake tensors of every architecture."""
        if not self.fakes:
            pytest.skip("the kernels of this backend launch code of their own")
        with checking(subject):
            check_fakes.check_fakes(subject, arch)

    def test_forward(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """The modules meet the reference."""
        with checking(subject, threads=None):
            check_modules.check_forward(subject, kernel, scheme, layer)

    def test_grouped(self, subject: Subject, kernel: Kernel, scheme: Scheme, experts: None) -> None:
        """Groups of rows meet the reference of their own weights."""
        with checking(subject, threads=None):
            check_grouped.check_grouped(subject, kernel, scheme)

    def test_copies(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """State dict, deepcopy, pickle."""
        with checking(subject):
            check_modules.check_copies(subject, kernel, scheme, layer)

    def test_moves(self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str) -> None:
        """To meta and back."""
        with checking(subject):
            check_modules.check_moves(subject, kernel, scheme, layer)

    def test_compile(
        self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str, traced: None
    ) -> None:
        """``torch.compile`` without graph breaks."""
        with checking(subject):
            check_ops.check_compile(subject, kernel, scheme, layer)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
    def test_inductor(self, subject: Subject) -> None:
        """Inductor, for one kernel and scheme."""
        with checking(subject):
            check_ops.check_compile(subject, subject.kernels[-1], subject.schemes[0], "linear", "inductor")

    def test_opcheck(
        self, subject: Subject, kernel: Kernel, scheme: Scheme, layer: str, traced: None
    ) -> None:
        """``torch.library.opcheck``."""
        with checking(subject):
            check_ops.check_op(subject, kernel, scheme, layer)

    def test_checkpoint(self, subject: Subject, scheme: Scheme, tmp_path: Path) -> None:
        """Load, save and load again."""
        with checking(subject):
            check_checkpoint.check_checkpoint(subject, scheme, tmp_path)


def _id(value: Any) -> str:
    """How a parameter is called in the name of a test."""
    return (
        value
        if isinstance(value, str)
        else cases.FORMAT_OF[value]
        if isinstance(value, torch.dtype)
        else str(value.name)
    )
