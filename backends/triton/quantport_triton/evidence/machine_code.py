"""Compiles launches for architectures that are not here, and looks for the matrix instruction in the machine
code.

The machine code and not PTX is the judge: on sm_90, PTX's ``mma.sync`` of e4m3 becomes a conversion and an
fp16 ``HMMA``.
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
"""KiB of shared memory for one program (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability").
"""

TENSOR_MEMORY = 512  # columns of a program on sm_100 and sm_103 (PTX ISA, "Tensor Memory")
_MATRIX = re.compile(r"\b((?:UTC)?[HIQO](?:G?)MMA(?:\.[A-Z0-9_x]+)*)")
_LOCAL = re.compile(r"\b(?:STL|LDL)\b")
_CODE = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
_PTX = re.compile(r"\b((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*)")


@dataclass(frozen=True)
class Compiled:
    """What became of one launch on one architecture.

    Attributes:
        instructions: Matrix instructions in the machine code.
        dots: Whether the kernel multiplies matrices at all.
        shared: Bytes of shared memory.
        spills: Instructions that read or write spilled registers.
        because: Why it was refused; empty when it was not.
    """

    instructions: tuple[str, ...] = ()
    dots: bool = False
    shared: int = 0
    spills: int = 0
    because: str = ""


def compile_for(launch: Launch, kind: str, arch: str) -> Compiled:
    """Compiles one launch for ``cuda`` and ``sm_*``, on any machine: no driver is asked."""
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
    except Exception as error:  # whatever the compiler raises is its refusal
        return Compiled(because=_reason(error))
    limit, shared = SHARED[arch], int(compiled.metadata.shared)
    too_much = (
        f"{shared} bytes of shared memory, where {arch} has {limit} KiB" if shared > limit << 10 else ""
    )
    if (columns := getattr(compiled.metadata, "tmem_size", None) or 0) > TENSOR_MEMORY:
        too_much = f"{columns} columns of tensor memory, of {TENSOR_MEMORY}"
    text = disassemble(compiled.asm["cubin"])
    found = set(_MATRIX.findall(text)) if text else set(_PTX.findall(compiled.asm["ptx"]))
    return Compiled(
        tuple(sorted(found)), "tt.dot" in compiled.asm["ttir"], shared, len(_LOCAL.findall(text)), too_much
    )


@contextmanager
def _silent() -> Iterator[None]:
    """What MLIR writes to the standard error itself, a page for each refusal, is not shown."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin, by the disassembler in Triton's own package; empty where that does not know the
    architecture.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=False).stdout


def _reason(error: Any) -> str:
    """What the innermost error says, in its last line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:200]


def fingerprint(launches: Sequence[Launch]) -> str:
    """Changes when what is compiled changes: sources without comments, types, constants, options, the version
    of Triton.
    """
    import triton

    texts = sorted({text for launch in launches for text in _sources(launch.kernel)})
    names = [f"{launch.name} {sorted(launch.divisible)}" for launch in launches]
    return hashlib.sha256("\n".join([triton.__version__, *names, *texts]).encode()).hexdigest()[:16]


@cache
def _sources(kernel: Any) -> frozenset[str]:
    """The source of a kernel and of every jitted function that it calls, without comments, docstrings and
    layout; and the constants of modules that they read."""
    constants: set[str] = set()
    found, left = {}, [kernel]
    while left:
        function = left.pop()
        if function in found:
            continue
        tokens = tokenize.generate_tokens(io.StringIO(function.src).readline)
        found[function] = " ".join(
            t.string for t in tokens if t.type in _CODE and not t.string.startswith('"""')
        )
        known = {name: function.fn.__globals__.get(name) for name in function.fn.__code__.co_names}
        left += [value for value in known.values() if hasattr(value, "src")]
        constants |= {
            f"{name} = {value!r}" for name, value in known.items() if hasattr(value, "value")
        }  # tl.constexpr
    return frozenset(found.values()) | constants
