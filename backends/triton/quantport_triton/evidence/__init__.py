"""The results of cross-compilation: ``<kind>.json``, written by ``benchmarks/compile.py``. A test fails where
they are out of date.

The outcome for a family of kernels, a scheme and an architecture is one of

* ``native``: every matrix multiplication in the machine code is a matrix instruction that the kernel is for;
* ``up-cast``: a matrix instruction is for a wider type than that of the operands;
* ``no matrix instruction``: a matrix multiplication runs on the ordinary units;
* ``refused``: the compiler refuses it, or it needs more memory than the architecture has; ``because`` says
  why;
* ``not compiled``: the matrix unit lacks the format, so that the kernel refuses the architecture anyway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from quantport.backend import Claim, Evidence, MachineCode, Reason, Refusal

_CHANGES_CODE = re.compile("double|channel|tensor|asym|fp32|fp16|bf16|g[0-9]+")


@cache
def read(kind: str) -> Mapping[str, Any]:
    """The evidence for one kind of device: ``triton``, the version, and ``targets``, entries by architecture,
    family and scheme.
    """
    path = files(__name__) / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"targets": {}}


def entry_of(kind: str, arch: str, family: str, scheme: str) -> Mapping[str, Any] | None:
    """The entry of a kernel family and scheme on an architecture; None where it was never compiled.

    Only options that change the code have entries: ``double``, those that describe stored numbers, and
    ``mse`` for ``quantize``.
    """
    entries: Mapping[str, Mapping[str, Any]] = read(kind)["targets"].get(arch, {}).get(family, {})
    name, *options = scheme.split(":")
    search = ["mse"] if "mse" in options and family == "quantize" else []
    return entries.get(":".join((name, *search, *filter(_CHANGES_CODE.fullmatch, options))))


def refusals(kind: str, arch: str, family: str, scheme: str) -> tuple[Reason, ...]:
    """Why a kernel cannot run on an architecture, or would gain nothing there; empty where it compiled to its
    matrix instruction, or was never compiled.
    """
    entry = entry_of(kind, arch, family, scheme)
    if entry is None or entry["outcome"] in ("native", "not compiled"):
        return ()
    version = read(kind)["triton"]
    if entry["outcome"] == "refused":
        return (Reason(f"Triton {version} refuses it for {arch}: {entry['because']}"),)
    code = entry["instruction"] or "ordinary multiplications"
    return (Reason(f"for {arch}, Triton {version} makes {code} of it: {entry['outcome']}", Refusal.SLOWER),)


def claim(kind: str, arch: str, family: str, scheme: str, kernel: str) -> Claim:
    """``compiled`` where the entry is ``native`` and the machine code of this ``kernel`` has a matrix
    instruction; else ``interpreted``, since the tests compare every kernel with the reference in Triton's
    interpreter.
    """
    entry = entry_of(kind, arch, family, scheme)
    tests = "tests/backends/triton, in Triton's interpreter"
    if entry is None or entry["outcome"] != "native":
        return Claim(Evidence.INTERPRETED, f"{tests}; not compiled for {arch}")
    instruction = entry["kernels"].get(kernel, {}).get("instruction", "")
    version, place = read(kind)["triton"], f"quantport_triton/evidence/{kind}.json"
    file = f"{arch}, Triton {version}: {place}"
    if not instruction:  # a kernel for one token, or one that decodes for the vendor's own matmul
        return Claim(Evidence.INTERPRETED, f"{tests}; machine code without matrix instructions for {file}")
    return Claim(
        Evidence.COMPILED,
        f"{instruction} in the machine code for {file}",
        MachineCode(place, "Triton", version, instruction),
    )
