"""Why an Ascend NPU cannot be used, with the command that fixes it. torch_npu is not imported, since that may
be what fails.

What is read is passed in, so that tests can pass fakes. On PCI, Huawei is vendor 19e5, and an NPU is of class
12, processing accelerator (pci.ids).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ENVIRONMENTS = ("cann", "ascend-toolkit")  # folders of CANN: from 8.5 on, and before


def distribution() -> tuple[str, tuple[str, ...]]:
    """Version and requirements of the installed torch-npu; an empty version where there is none."""
    try:
        package = metadata.distribution("torch-npu")
    except metadata.PackageNotFoundError:
        return "", ()
    return package.version, tuple(package.requires or ())


def opens(library: str) -> bool:
    """Whether a library loads, with all that it needs."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Surroundings:
    """The parts of the system that are looked at.

    Attributes:
        dev: Folder of the device nodes.
        pci: Folder of the devices on the PCI bus.
        ascend: Folder of the driver and CANN.
        torch_npu: Version and requirements of the installed torch-npu.
        opens: Whether a library can be loaded.
    """

    dev: Path = Path("/dev")
    pci: Path = Path("/sys/bus/pci/devices")
    ascend: Path = Path("/usr/local/Ascend")
    torch_npu: tuple[str, tuple[str, ...]] = field(default_factory=distribution)
    opens: Callable[[str], bool] = opens


def advice(torch_version: str, system: Surroundings) -> tuple[str, ...]:
    """One line for each thing that is missing; none where there is neither an NPU nor torch_npu.

    Args:
        torch_version: ``torch.__version__``.
        system: The system.
    """
    nodes = sorted(system.dev.glob("davinci[0-9]*"))
    npu = str(nodes[0]) if nodes else _on_bus(system.pci)
    seen = f"an Ascend NPU is here ({npu})" if npu else ""
    lines = (
        _driver(seen, bool(nodes), system),
        _package(seen, torch_version, system.torch_npu),
        _cann(system),
    )
    return tuple(line for line in lines if line)


def _on_bus(pci: Path) -> str:
    """The address of the first NPU on the PCI bus; empty if there is none."""

    def read(device: Path, name: str) -> str:
        file = device / name
        return file.read_text().strip() if file.is_file() else ""

    devices = sorted(pci.iterdir()) if pci.is_dir() else []
    return next(
        (d.name for d in devices if read(d, "vendor") == "0x19e5" and read(d, "class").startswith("0x12")), ""
    )


def _driver(seen: str, nodes: bool, system: Surroundings) -> str:
    driver = system.ascend / "driver"
    if seen and not nodes:
        install = (
            "install driver and firmware, as root: "
            "./Ascend-hdk-<product>-npu-driver_<version>_linux-$(uname -m).run --full"
        )
        return f"{seen}, but it has no node in {system.dev}: {install}; then look at npu-smi info"
    if seen and not driver.is_dir():
        return (
            f"{seen}, but the driver's libraries are not in {driver}: in a container, start it with -v "
            f"{driver}:{driver}"
        )
    return ""


def _package(seen: str, torch_version: str, package: tuple[str, tuple[str, ...]]) -> str:
    minor, (version, requirements) = _minor(torch_version), package
    command = (
        f'pip install "torch-npu=={minor}.*", or, before there is one, '
        "pip install torch-npu, which brings its own torch"
    )
    if not version:
        return f"{seen}, but torch_npu is not installed: {command}" if seen else ""
    wanted = next(
        (m[1] for line in requirements if (m := re.match(r"torch\s*\(?==\s*([\w.+]+)", line))), version
    )
    if _minor(wanted) != minor:
        return (
            f"torch_npu {version} is made for torch {_minor(wanted)}, and this is torch "
            f"{torch_version}: {command}"
        )
    return ""


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _cann(system: Surroundings) -> str:
    if not system.torch_npu[0] or system.opens("libascendcl.so"):
        return ""
    scripts = [system.ascend / name / "set_env.sh" for name in ENVIRONMENTS]
    script = next((s for s in scripts if s.is_file()), None)
    if script:
        return f"torch_npu needs CANN, whose libascendcl.so the loader does not find: source {script}"
    install = "./Ascend-cann-toolkit_<version>_linux-$(uname -m).run --full"
    return f"torch_npu needs CANN, and libascendcl.so is not here: {install}; then source {scripts[-1]}"
