"""Compiles the driver: one library with everything, and libraries of the other names that torch_npu links
against.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAMES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")


def build(where: Path) -> None:
    """Compiles the libraries into a directory for ``LD_LIBRARY_PATH``."""
    where.mkdir(parents=True, exist_ok=True)
    shared = ["gcc", "-shared", "-fPIC", "-O1", "-w"]
    source = Path(__file__).with_name("driver.c")
    subprocess.run([*shared, "-o", where / "libascendcl.so", source], check=True)
    # torch_npu opens some of them by name and looks functions up there, so each one links to the first.
    for name in NAMES:
        out = [
            "-o",
            where / f"lib{name}.so",
            "-Wl,--no-as-needed",
            f"-L{where}",
            "-lascendcl",
            "-x",
            "c",
            "/dev/null",
        ]
        subprocess.run([*shared, *out], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
