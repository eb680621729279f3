"""What the Triton kernels share: a name for each room, and reasons and claims that follow from the evidence."""

from __future__ import annotations

from collections.abc import Sequence

from quantport.backend import Claim, Kernel, Request
from quantport_triton import available, evidence


class TritonKernel(Kernel):
    """A kernel in Triton's language.

    Attributes:
        family: What it is called within every room, in the evidence and in the tuned configurations.
        matrix: How the matrix instructions in machine code begin that are native for it.
    """

    family: str
    matrix: tuple[str, ...] = ("HMMA", "HGMMA", "UTCHMMA")  # 16-bit operands

    def __init__(self, room: str) -> None:
        self.name = f"{room}.triton_{self.family}"

    def reasons_against(self, request: Request) -> Sequence[str]:
        """Why Triton is not here, or does not compile the kernel for this architecture."""
        reasons = [reason] if (reason := available()) and not request.device.simulated else []
        scheme, arch = request.weight.scheme.name, request.device.arch
        return [*reasons, *evidence.refusals(arch.kind, arch.name, self.family, scheme)]

    def claim(self, request: Request) -> Claim:
        """``compiled`` where machine code with the matrix instruction was made for the architecture, else ``interpreted``."""
        arch = request.device.arch
        return evidence.claim(arch.kind, arch.name, self.family, request.weight.scheme.name)
