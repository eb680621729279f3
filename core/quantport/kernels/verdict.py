"""Verdicts and evidence. The matrix, the plan, the errors and the docs are folds over these values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Evidence(str, Enum):
    """How we know that a cell is true, strongest first."""

    MEASURED = "measured"
    COMPILED = "compiled"
    SIMULATED = "simulated"
    INTERPRETED = "interpreted"
    DECLARED = "declared"

    def __str__(self) -> str:
        return self.value


class Status(str, Enum):
    """What a user gets.

    ``native``: the asked precision, on units built for it. ``weight_only``: the weights as asked, the
    activations in 16 bits. ``dequantize``: the asked weight-only numerics, through a pure-torch
    dequantization. ``reference``: exact emulation of the asked numerics, slow. ``unsupported``: nothing runs
    it.
    """

    NATIVE = "native"
    WEIGHT_ONLY = "weight_only"
    DEQUANTIZE = "dequantize"
    REFERENCE = "reference"
    UNSUPPORTED = "unsupported"

    def __str__(self) -> str:
        return self.value


class Refusal(str, Enum):
    """What would happen if a refused call were made all the same. Only ``impossible`` is put to the test of
    truth.

    ``impossible``: it raises, or its result is wrong. ``unsafe``: it must not be made: it reads past its
    operands, crashes or hangs, or nobody knows what it does. ``slower``: it runs, and another path is known
    to be faster. ``not_offered``: it may run, and nobody wants it.
    """

    IMPOSSIBLE = "impossible"
    UNSAFE = "unsafe"
    SLOWER = "slower"
    NOT_OFFERED = "not_offered"

    def __str__(self) -> str:
        return self.value


class ReasonCode(str, Enum):
    """What a refusal is about, where code asks.

    ``no_matrix_instruction``: the architecture multiplies the format of the scheme on no unit of its own.
    ``raised``: the kernel raised when it was asked. ``other``: everything else.
    """

    NO_MATRIX_INSTRUCTION = "no_matrix_instruction"
    RAISED = "raised"
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Reason:
    """Why a kernel refuses a request: code decides by kind and code, people read the text.

    Attributes:
        text: For people.
        kind: What would happen if the call were made all the same.
        code: What it is about.
    """

    text: str
    kind: Refusal = Refusal.IMPOSSIBLE
    code: ReasonCode = ReasonCode.OTHER

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Measurement:
    """What ``measured`` rests on: a file that says so of the kernel with the scheme.

    Attributes:
        file: Its path from a package that is installed (``quantport_cpu/tuned/x86_vnni.json``), or from
            the root of the sources; absolute where the user measured.
        device: Name of the device, as in the file.
        date: When, as in the file.
        commit: Of the sources that were measured, or their version, as in the file.
    """

    file: str
    device: str
    date: str
    commit: str


@dataclass(frozen=True)
class MachineCode:
    """What ``compiled`` rests on: a file that says so of the architecture.

    Attributes:
        file: Its path, as in ``Measurement``.
        compiler: Name of the compiler.
        version: Its version, as in the file.
        instruction: The matrix instruction in the machine code, as in the file.
    """

    file: str
    compiler: str
    version: str
    instruction: str


@dataclass(frozen=True)
class Claim:
    """Evidence with where to check it: a results file, a test, or a vendor page.

    Attributes:
        evidence: How it is known.
        source: Where to check it, for people.
        proof: The same for programs: ``measured`` needs a ``Measurement``, ``compiled`` needs
            ``MachineCode``.
    """

    evidence: Evidence
    source: str
    proof: Measurement | MachineCode | None = None


@dataclass(frozen=True)
class Accepted:
    """A kernel takes the request.

    Attributes:
        kernel: Name of the kernel.
        status: What the user gets.
        precision: Effective precision, for example ``W8A16``.
        claim: How we know.
        speed: Measured speed relative to the best BF16 path for the expected tokens (1.0 = equal); None =
            not measured.
        slow: Why it is known to be slower than BF16 without measuring, or empty.
        numeric_deviation: Named difference from the scheme's numerics, or an empty string.
    """

    kernel: str
    status: Status
    precision: str
    claim: Claim
    speed: float | None
    slow: str = ""
    numeric_deviation: str = ""


@dataclass(frozen=True)
class Rejected:
    """A kernel refuses the request, for these reasons (never empty); ``unrelated`` when it is for other
    schemes or layers.
    """

    kernel: str
    reasons: tuple[Reason, ...]
    unrelated: bool = False


Verdict = Accepted | Rejected


def check_verdict(verdict: object) -> None:
    """Refuses what is no verdict: a kernel of a stranger may return anything.

    Raises:
        TypeError: says what it is, and what it should be.
    """
    if isinstance(verdict, Rejected):
        if not verdict.reasons or not all(isinstance(one, Reason) for one in verdict.reasons):
            raise TypeError(f"its reasons are {verdict.reasons!r}: return Reason(text, kind), one or more")
        return
    if not isinstance(verdict, Accepted):
        raise TypeError(f"its verdict is {verdict!r}: return Accepted or Rejected")
    for name, kind in _FIELDS.items():
        value = getattr(verdict, name)
        if not isinstance(value, kind):
            raise TypeError(f"its {name} is {value!r}: return a {kind.__name__}")
    if not isinstance(verdict.claim.evidence, Evidence):
        raise TypeError(f"the evidence of its claim is {verdict.claim.evidence!r}: return an Evidence")
    speed = verdict.speed
    if speed is not None and not (isinstance(speed, int | float) and 0 <= speed < math.inf):
        raise TypeError(f"its speed is {speed!r}: return a ratio, or None")


_FIELDS = {"status": Status, "precision": str, "claim": Claim, "slow": str, "numeric_deviation": str}
