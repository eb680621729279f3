"""The base class of the Triton kernels: names, and reasons and claims that follow from the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantport.backend import Claim, Kernel, Reason, Refusal, Request
from quantport_triton import FIRST, OLDEST, available, evidence, version
from quantport_triton.tuned import tuned_kernel


class TritonKernel(Kernel):
    """A kernel in Triton's language.

    Attributes:
        family: Its name without that of the room; the key of its evidence and configurations.
        oldest: The first Triton version that compiles the kernel to its matrix instruction, by architecture,
            where that is later than ``OLDEST``.
        matrix: Prefixes of the matrix instructions that are native for it.
    """

    family: str
    oldest: Mapping[str, tuple[int, int]] = FIRST
    matrix: tuple[str, ...] = ("HMMA", "HGMMA", "UTCHMMA")  # 16-bit operands

    def __init__(self, room: str) -> None:
        self.name = f"{room}.triton_{self.family}"

    def reasons_against(self, request: Request) -> Sequence[Reason]:
        """Why Triton is not installed, or does not compile the kernel for this architecture."""
        reasons = [Reason(why)] if (why := available()) and not request.device.simulated else []
        scheme, arch = request.weight.scheme.name, request.device.arch
        oldest = self.oldest.get(arch.name, OLDEST)
        if not reasons and not request.device.simulated and version() < oldest:
            have, need = (".".join(map(str, numbers)) for numbers in (version(), oldest))
            reasons.append(Reason(f"Triton {have} does not compile it for {arch.name}: {need} does"))
        if request.dtype not in (torch.bfloat16, torch.float16):
            # Triton might multiply them all the same, on other units or as a narrower type.
            reasons.append(
                Reason(f"{self.name} takes activations of 16 bits, not {request.dtype}", Refusal.NOT_OFFERED)
            )
        elif request.dtype is torch.bfloat16 and "bf16" not in arch.native:
            reasons.append(
                Reason(f"{arch.name} ({arch.title}) has no bf16: activations must be float16 [{arch.source}]")
            )
        return [*reasons, *evidence.refusals(arch.kind, arch.name, self.family, scheme)]

    def claim(self, request: Request) -> Claim:
        """``compiled`` where the kernel for this number of tokens has its matrix instruction in the machine
        code for the architecture, else ``interpreted``. The evidence is for the dtype that the architecture
        computes in.
        """
        arch = request.device.arch
        name = arch.name if request.dtype is arch.compute else f"{arch.name} in {request.dtype}"
        return evidence.claim(
            arch.kind, name, self.family, request.weight.scheme.name, self.kernel_of(request)
        )

    def kernel_of(self, request: Request) -> str:
        """Name of the kernel of the family that runs for the number of tokens of a request."""
        return tuned_kernel(request.device.arch.name, self.family, request.num_tokens)
