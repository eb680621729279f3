"""Machine code for Arm, run on an emulated core: it writes what this processor writes, to the bit.
Each call of a kernel is recorded here, replayed by a C program with the kernel's object file for Arm linked
in, under qemu. Two kinds of kernels are compiled for Arm only (`test_machine_code.py`): those over tables of
jobs, which hold addresses, and those whose operands lie, or are added up, as the vectors of the target have
it. In the nightly target, where Debian's ``qemu-user-static`` and ``gcc-aarch64-linux-gnu`` are installed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantport import numerics
from quantport.scheme.catalog import BUILTIN
from quantport_cpu import jit

TOOLS = ("qemu-aarch64-static", "aarch64-linux-gnu-gcc")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(jit.why_unavailable()), reason=jit.why_unavailable() or "numba is installed"),
    pytest.mark.skipif(
        bool(MISSING), reason=f"no emulated Arm core here: {', '.join(MISSING)} not installed"
    ),
]

if not jit.why_unavailable():
    import machine_code

    from quantport_cpu.jit import (
        gguf_batch,
        int4_batch,
        parallel_for,
        quantize,
        small_batch,
    )
    from quantport_cpu.jit.memory import Array

X = torch.randn(3, 320, generator=torch.Generator().manual_seed(5))
W = torch.randn(64, 320, generator=torch.Generator().manual_seed(6))


def blocks(name: str) -> Any:
    """A call of the kernel for few rows of one scheme."""
    scheme = BUILTIN[name]
    stored = numerics.quantize_weight(W.bfloat16(), scheme)
    codes, scale = stored["weight_packed"], stored["weight_scale"]
    weight = small_batch.Blocks(
        scheme.weight.format, scheme.weight.scale, scheme.weight.group_size, codes, scale, None, 320
    )
    return lambda: small_batch.blocks(X, weight)


def gguf(name: str) -> Any:
    """A call of the kernel for few rows of one block type."""
    stored = numerics.quantize_weight(W.bfloat16(), BUILTIN[name])
    return lambda: gguf_batch.multiply(X, stored["weight_blocks"], name)


def gguf_int8(name: str) -> Any:
    """A call of the kernels of one block type with int8 activations."""
    stored = numerics.quantize_weight(W.bfloat16(), BUILTIN[name])
    return lambda: gguf_batch.multiply_quantized(X.bfloat16(), stored["weight_blocks"], name)


def int4(run: Any) -> Any:
    """A call over an int4 weight with offsets."""

    def call() -> Any:
        stored = numerics.quantize_weight(W.bfloat16(), BUILTIN["int4_mse"])
        return run(int4_batch.Int4(*stored.values()), int4_batch.Layout(64, True))

    return call


def quantizer(name: str) -> Any:
    return lambda: quantize.quantize_weight(W.bfloat16(), BUILTIN[name])


CALLS = {
    "decode.fp8": lambda: small_batch.decode_fp8(
        W.to(torch.float8_e4m3fn).view(torch.uint8), None, 0, torch.empty(64, 320, dtype=torch.bfloat16)
    ),
    "decode.int4": int4(
        lambda weight, layout: int4_batch.decode(
            weight, 320, layout, torch.empty(64, 320, dtype=torch.bfloat16)
        )
    ),
    "gemv_blocks.nf4": lambda: blocks("nf4")(),
    "gemv_blocks.e2m3.0": lambda: blocks("mxfp6_e2m3")(),
    "gemv_gguf.q4_0": lambda: gguf("q4_0")(),
    "gemv_gguf.q5_k": lambda: gguf("q5_k")(),
    "gemv_gguf.q6_k": lambda: gguf("q6_k")(),
    "gemm_gguf.q4_0": lambda: gguf_int8("q4_0")(),
    "gemm_gguf.q5_k": lambda: gguf_int8("q5_k")(),
    "gemm_gguf.q6_k": lambda: gguf_int8("q6_k")(),
    "gguf_rows.q4_0": lambda: gguf_int8("q4_0")(),
    "gguf_rows.q5_k": lambda: gguf_int8("q5_k")(),
    "encode": quantizer("fp8_per_block"),
    "least_squares": quantizer("int4_mse"),
    "q6_k": quantizer("q6_k"),
    "q4_k": quantizer("q4_k"),
    "dual": quantizer("mxfp4_dualscale"),
    "row_maxima": quantizer("nvfp4"),
    "block_encode.e2m1": quantizer("nvfp4:mse"),
    "gguf.q4_0": quantizer("q4_0"),
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program for Arm for each kernel."""
    folder = tmp_path_factory.mktemp("arm")
    call = [sys.executable, machine_code.__file__, "--arm", "--all", "--objects", str(folder)]
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+neon"}
    subprocess.run(call, env=environment, capture_output=True, check=True)
    for file in folder.glob("*.o"):
        program, source = file.with_suffix(".program"), Path(__file__).parent / "replay.c"
        subprocess.run([TOOLS[1], "-static", "-O1", "-o", program, source, file], check=True)
    return folder


def region(array: Array) -> tuple[int, bytes]:
    """Where the memory of a word begins, and its bytes."""
    owner = array.owner
    if isinstance(owner, ctypes.Array):
        return ctypes.addressof(owner), bytes(owner)
    assert isinstance(owner, Tensor)
    storage = owner.untyped_storage()
    return storage.data_ptr(), ctypes.string_at(storage.data_ptr(), storage.nbytes())


class Recorder:
    """Records the first call of one kernel: its input for the program, and the memory afterwards."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.native = kernel, parallel_for.Kernel.__call__
        self.input, self.after = b"", b""

    def call(self, kernel: Any, blocks_: int, *words: int | Array, threads: int = 1) -> None:
        """Stands in for ``Kernel.__call__``."""
        arrays = [w for w in words if isinstance(w, Array)]
        wanted = kernel is self.kernel and not self.input
        if wanted:
            regions = dict(region(a) for a in arrays)
            places = list(regions)
            lines = [(-1, 0), (-1, blocks_)]
            for w in words:
                start = region(w)[0] if isinstance(w, Array) else 0
                lines.append((places.index(start), w.address - start) if isinstance(w, Array) else (-1, w))
            numbers = [
                len(places),
                *map(len, regions.values()),
                len(lines),
                *(n for line in lines for n in line),
            ]
            self.input = struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(regions.values())
        self.native(kernel, blocks_, *words, threads=1)
        if wanted:
            self.after = b"".join(dict(region(a) for a in arrays).values())


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bytes_on_an_emulated_core(
    name: str, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(dict(machine_code.kernels(whole=True))[name])
    monkeypatch.setattr(
        parallel_for.Kernel, "__call__", lambda kernel, *args, **kw: recorder.call(kernel, *args, **kw)
    )
    made = CALLS[name]()
    if callable(made):
        made()
    assert recorder.input, f"{name} was not called"
    program = [TOOLS[0], str(objects / f"{name}.program")]
    found = subprocess.run(program, input=recorder.input, capture_output=True, check=True).stdout
    assert recorder.after not in recorder.input  # it wrote something
    differing = sum(a != b for a, b in zip(found, recorder.after, strict=True))
    assert differing == 0, f"{differing} of {len(found)} bytes differ"
