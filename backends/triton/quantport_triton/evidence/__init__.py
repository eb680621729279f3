"""What cross-compilation found: ``<kind>.json``, written by ``benchmarks/compile.py`` and kept fresh by a
test.

For a family of kernels, a scheme and an architecture the outcome is one of

* ``native``: machine code was made, and every matrix multiplication in it is the matrix instruction that the
kernel is for;
* ``up-cast``: its matrix instruction is for a wider type than the operands;
* ``no matrix instruction``: it multiplies on the ordinary units;
* ``refused``: the compiler, or the shared memory of the architecture, refuses it; ``because`` says why;
* ``not compiled``: the matrix unit lacks the format, for which the kernel refuses the architecture anyway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from quantport.backend import Claim, Evidence, MachineCode, Reason, Refusal


@cache
def read(kind: str) -> Mapping[str, Any]:
    """The evidence for one kind of device: ``triton`` (the version), and ``targets``: architecture -> family
    -> scheme.
    """
    path = files(__name__) / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"targets": {}}


def found(kind: str, arch: str, family: str, scheme: str) -> Mapping[str, Any] | None:
    """The entry for an architecture, or None where nobody compiled it. Options of a scheme that change no
    code are left out: all but ``double``, and ``mse`` where weights are quantized."""
    families: Mapping[str, Mapping[str, Any]] = read(kind)["targets"].get(arch, {}).get(family, {})
    name, *options = scheme.split(":")
    double = ["double"] if "double" in options else []
    search = ["mse"] if "mse" in options and family == "quantize" else []
    return families.get(":".join((name, *search, *double)))


def refusals(kind: str, arch: str, family: str, scheme: str) -> tuple[Reason, ...]:
    """Why a kernel cannot run there, or would gain nothing: empty where it compiled as it should, or was
    never compiled.
    """
    entry = found(kind, arch, family, scheme)
    if entry is None or entry["outcome"] in ("native", "not compiled"):
        return ()
    version = read(kind)["triton"]
    if entry["outcome"] == "refused":
        return (Reason(f"Triton {version} refuses it for {arch}: {entry['because']}"),)
    made = entry["instruction"] or "ordinary multiplications"
    return (Reason(f"for {arch}, Triton {version} makes {made} of it: {entry['outcome']}", Refusal.SLOWER),)


def claim(kind: str, arch: str, family: str, scheme: str, kernel: str) -> Claim:
    """``compiled`` where the entry is ``native`` and its launches of this ``kernel`` hold the instruction;
    else it has met the reference in Triton's interpreter, and no more."""
    entry = found(kind, arch, family, scheme)
    tests = "tests/backends/triton, in Triton's interpreter"
    if entry is None or entry["outcome"] != "native":
        return Claim(Evidence.INTERPRETED, f"{tests}; not compiled for {arch}")
    seen = entry["kernels"].get(kernel, {}).get("instruction", "")
    version, place = read(kind)["triton"], f"quantport_triton/evidence/{kind}.json"
    file = f"{arch}, Triton {version}: {place}"
    if not seen:  # it needs none: one row, or values for the vendor's own matmul
        return Claim(Evidence.INTERPRETED, f"{tests}; machine code without matrix instructions for {file}")
    return Claim(
        Evidence.COMPILED,
        f"{seen} in the machine code for {file}",
        MachineCode(place, "Triton", version, seen),
    )
