"""Devices and architectures: plain frozen values, so that planning needs no hardware."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Arch:
    """What one architecture can do, as its vendor documents it.

    Attributes:
        kind: Device kind, the name of the room that knows it (the part before the colon of ``cpu:x86_vnni``).
        name: Architecture name within the kind, for example ``x86_vnni``.
        title: The name on the box, for people.
        native: Formats that its matrix or dot-product unit multiplies natively (names of
            ``quantport.scheme.formats``).
        source: Where ``native`` comes from (a vendor page, a tool and its version).
        family: The group under which published tables list it, for example ``Ampere``.
        storage_only_dtypes: Dtypes of which it moves the bytes and can do nothing else with.
    """

    kind: str
    name: str
    title: str
    native: frozenset[str]
    source: str
    family: str = ""
    storage_only_dtypes: frozenset[torch.dtype] = frozenset()

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    @property
    def compute(self) -> torch.dtype:
        """The 16-bit type that weight-only kernels compute in: bf16 where it is native, else fp16."""
        return torch.bfloat16 if "bf16" in self.native or "fp16" not in self.native else torch.float16


@dataclass(frozen=True)
class Device:
    """One device, found or simulated.

    Attributes:
        arch: Its architecture.
        index: Ordinal within its kind.
        name: Marketing name as the driver says it.
        memory: Usable memory in bytes when it was last looked at, or None when unknown (a simulated device).
            Devices that differ in nothing else are equal.
        torch_type: The ``type`` of the matching ``torch.device``.
        simulated: True if nobody looked for it: it stands for hardware that one asks about.
        features: Extra facts of the driver, for example CPU instruction sets.
    """

    arch: Arch
    index: int = 0
    name: str = ""
    memory: int | None = field(default=None, compare=False)
    torch_type: str = "cpu"
    simulated: bool = False
    features: frozenset[str] = field(default_factory=frozenset)

    @property
    def kind(self) -> str:
        """Device kind: the name of the room."""
        return self.arch.kind

    @property
    def torch_device(self) -> torch.device:
        """The torch device to place tensors on."""
        return (
            torch.device(self.torch_type)
            if self.torch_type == "cpu"
            else torch.device(self.torch_type, self.index)
        )

    def __str__(self) -> str:
        return (
            f"{self.kind}:{self.arch.name}"
            if self.simulated
            else f"{self.kind}:{self.index} ({self.arch.name})"
        )
