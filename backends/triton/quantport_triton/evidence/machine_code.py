"""Compiles launches for any architecture, without a device, and finds the matrix instructions in the machine
code.

The machine code decides, not PTX: on sm_90, ``mma.sync`` of e4m3 in PTX becomes a conversion and an fp16
``HMMA``.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantport_triton.launch import Launch

SHARED = {
    "sm_70": 96,
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_103": 227,
    "sm_110": 227,
    "sm_120": 99,
    "sm_121": 99,
}
"""KiB of shared memory that a program may use (CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability").
"""

TENSOR_MEMORY = 512
"""Columns of tensor memory that a program may use on sm_100 and sm_103 (PTX ISA, "Tensor Memory")."""

_MATRIX = re.compile(r"\b((?:UTC)?[HIQO](?:G?)MMA(?:\.[A-Z0-9_x]+)*)")
_LOCAL = re.compile(r"\b(?:STL|LDL)\b")
_CODE = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
_PTX = re.compile(r"\b((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*)")


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one launch for one architecture.

    Attributes:
        instructions: Matrix instructions in the machine code.
        dots: Whether the kernel multiplies matrices at all.
        shared: Bytes of shared memory.
        spills: Instructions that read or write spilled registers.
        because: Why it was refused; empty where it was not.
    """

    instructions: tuple[str, ...] = ()
    dots: bool = False
    shared: int = 0
    spills: int = 0
    because: str = ""


def compile_for(launch: Launch, kind: str, arch: str) -> Compiled:
    """Compiles one launch for ``cuda`` and ``sm_*`` on any machine, without a driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(launch.types)
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(types)
        if name in launch.divisible and types[name] != "constexpr"
    }
    source = ASTSource(launch.kernel, types, dict(launch.constants), even)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": launch.fusion}
    try:
        with _silent():
            compiled = triton.compile(
                source, target=GPUTarget(kind, int(arch.removeprefix("sm_")), 32), options=options
            )
    except Exception as error:  # the compiler refuses with errors of many types
        return Compiled(because=_reason(error))
    limit, shared = SHARED[arch], int(compiled.metadata.shared)
    because = ""
    if shared > limit << 10:
        because = f"{shared} bytes of shared memory, where {arch} has {limit} KiB"
    if (columns := getattr(compiled.metadata, "tmem_size", None) or 0) > TENSOR_MEMORY:
        because = f"{columns} columns of tensor memory, of {TENSOR_MEMORY}"
    text = disassemble(compiled.asm["cubin"])
    instructions = set(_MATRIX.findall(text)) if text else set(_PTX.findall(compiled.asm["ptx"]))
    dots = "tt.dot" in compiled.asm["ttir"]
    return Compiled(tuple(sorted(instructions)), dots, shared, len(_LOCAL.findall(text)), because)


@contextmanager
def _silent() -> Iterator[None]:
    """Hides what MLIR writes to the standard error by itself, a page for each refusal."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin, from the disassembler in Triton's package; empty where that lacks the
    architecture.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=False).stdout


def _reason(error: Any) -> str:
    """The last line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:200]


def fingerprint(launches: Sequence[Launch]) -> str:
    """A hash of all that decides the machine code: sources without comments, types, constants, options and
    the version of Triton.
    """
    import triton

    texts = sorted({text for launch in launches for text in _sources(launch.kernel)})
    names = [f"{launch.name} {sorted(launch.divisible)}" for launch in launches]
    return hashlib.sha256("\n".join([triton.__version__, *names, *texts]).encode()).hexdigest()[:16]


@cache
def _sources(kernel: Any) -> frozenset[str]:
    """The sources of a kernel and of every jitted function that it calls, without comments, docstrings and
    layout, and the module constants that they read.
    """
    constants: set[str] = set()
    sources, left = {}, [kernel]
    while left:
        function = left.pop()
        if function in sources:
            continue
        tokens = tokenize.generate_tokens(io.StringIO(function.src).readline)
        sources[function] = " ".join(
            t.string for t in tokens if t.type in _CODE and not t.string.startswith('"""')
        )
        read = {name: function.fn.__globals__.get(name) for name in function.fn.__code__.co_names}
        left += [value for value in read.values() if hasattr(value, "src")]
        # A tl.constexpr has a value.
        constants |= {f"{name} = {value!r}" for name, value in read.items() if hasattr(value, "value")}
    return frozenset(sources.values()) | constants
