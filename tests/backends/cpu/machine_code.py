"""Compiles kernels for a processor, which need not be this one, and prints as JSON what their code holds.

    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c python tests/backends/cpu/machine_code.py
    [--all] [--arm]

``--arm``: the code is written without an instruction of x86, and compiled for 64-bit Arm. ``--objects DIR``
keeps the object files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding as llvm

from quantport_cpu.jit import (
    block_encode,
    decode,
    encode,
    factors,
    gemm_amx,
    gemm_fp32,
    gemm_gguf,
    gemm_int4,
    gemm_int8,
    gemv_bf16,
    gemv_blocks,
    gemv_bytes,
    gemv_gguf,
    gguf,
    gguf_rows,
    int4_rows,
    kquants,
    kv_attention,
    kv_encode,
    least_squares,
    machine,
    q6k,
    search,
    token_experts,
)
from quantport_cpu.jit.parallel_for import Kernel
from quantport_cpu.jit.target import host_target

BRANCH = re.compile(r"j[a-z]+\s|b\.[a-z]+\s|cbn?z\s|tbn?z\s|b\s")
# instructions that multiply vectors, and the bits of one of the products that they add
MULTIPLY = {"vpdpbusd": 8, "vpmaddwd": 16, "vpmaddubsw": 8, "sdot": 8, "fmla": 32, "smull": 32, "smlal": 32}
MULTIPLY |= {
    f"vf{sign}m{how}{order}ps": 32
    for sign in ("", "n")
    for how in ("add", "sub")
    for order in (132, 213, 231)
}
TILE_PRODUCTS = 16 * 16 * 64  # of tdpbssd
SPILL = re.compile(
    r"^v?mov[a-z0-9]*\s.*\(%rsp.*%[xyz]mm|%[xyz]mm.*\(%rsp|^(?:str|ldr|stp|ldp)\s+q.*\[(?:sp|x29)"
)
ARM = ("aarch64-linux-gnu", "generic", "+neon,+fp-armv8")


def kernels(whole: bool) -> Iterator[tuple[str, Kernel]]:
    """A kernel for each kind of code, or every kernel."""
    yield from {
        "gemm_int8": gemm_int8.kernel(),
        "token.int8": token_experts.int8_kernel(),
        "gemv_bf16": gemv_bf16.kernel(),
        "gemv_bytes.fp8": gemv_bytes.kernel(gemv_bytes.E4M3),
        "gemv_bytes.int8": gemv_bytes.kernel(gemv_bytes.INT8),
        "gemm_int4": gemm_int4.kernel(128, False, factors.BF16, 1),
        "gemm_int4.digits": gemm_int4.kernel(128, False, factors.BF16, int4_rows.DIGITS),
        "gemm_fp32": gemm_fp32.kernel(128, False, factors.BF16),
        "gemv_blocks.nf4": gemv_blocks.kernel("nf4", gemv_blocks.F32_SCALE, 64),
        "gemv_gguf.q4_k": gemv_gguf.kernel("q4_k"),
        "gemm_gguf.q4_k": gemm_gguf.kernel("q4_k"),
        "block_encode.e2m1": block_encode.kernel("e2m1", 16, block_encode.E4M3, True),
        "encode": encode.kernel(encode.FP8),
        "encode.fp32": encode.kernel(encode.FP8, encode.FP32),
        "kv_attention.int8": kv_attention.kernel("int8", 128, 128, 4),
        "q4_k": kquants.kernel("q4_k"),
    }.items()
    if host_target().has(*gemm_amx.FEATURES):
        yield "gemm_amx", gemm_amx.kernel
    if not whole:
        return
    yield from {
        "gemm_int8.prepare": gemm_int8.prepare_kernel(),
        "decode.fp8": decode.fp8_kernel,
        "kv_encode": kv_encode.kernel("e5m2", 128, 64, kv_encode.BF16),
        "gemm_int4.prepare": int4_rows.prepare_kernel(128),
        "gemm_int4.split": int4_rows.digits_kernel(128),
        "token.int4": token_experts.int4_kernel(128, False, factors.BF16, 1),
        "token.int4.digits": token_experts.int4_kernel(64, True, factors.BF16, int4_rows.DIGITS),
        "token.fp8": token_experts.bytes_kernel(gemv_bytes.E4M3),
        "gemm_int4.offsets": gemm_int4.kernel(64, True, factors.BF16, int4_rows.DIGITS),
        "gemm_fp32.offsets": gemm_fp32.kernel(64, True, factors.BF16),
        "decode.int4": decode.int4_kernel(64, True, factors.BF16),
        "gemm_int4.fp16": gemm_int4.kernel(32, True, factors.FP16, int4_rows.DIGITS),
        "gemm_int4.fp32": gemm_int4.kernel(128, True, factors.FP32, int4_rows.DIGITS),
        "gemm_fp32.fp16": gemm_fp32.kernel(128, True, factors.FP16),
        "decode.int4.fp16": decode.int4_kernel(128, True, factors.FP16),
        "token.int4.fp32": token_experts.int4_kernel(128, True, factors.FP32, int4_rows.DIGITS),
        "least_squares": least_squares.kernel,
        "q6_k": q6k.kernel,
        "dual": search.dual_kernel,
        "row_maxima": block_encode.row_maxima_kernel,
        "gguf.q4_0": gguf.kernel("q4_0"),
        "gguf.q8_0": gguf.kernel("q8_0"),
        "q5_k": kquants.kernel("q5_k"),
    }.items()
    for name in ("e4m3fn", "e5m2", "int4"):
        yield from ((f"kv_attention.{name}.{t}", kv_attention.kernel(name, 80, 128, t)) for t in (1, 2, 4))
    for name, number in gemv_gguf.NUMBERS.items():
        yield f"gemv_gguf.{name}", gemv_gguf.kernel(name)
        if name in gemm_gguf.TYPES:
            yield f"gemm_gguf.{name}", gemm_gguf.kernel(name)
            yield f"gguf_rows.{name}", gguf_rows.kernel(gemm_gguf.rows_kind(number), 2)
    for name in ("e2m1", "e3m2", "e2m3", "e4m3fn", "fp4", "nf4"):
        for scale, group in (
            (gemv_blocks.E8M0, 32),
            (gemv_blocks.E4M3, 16),
            (gemv_blocks.F32_SCALE, 64),
            (gemv_blocks.DUAL, 32),
        ):
            yield f"gemv_blocks.{name}.{scale}", gemv_blocks.kernel(name, scale, group)
        for scale, group in ((block_encode.E8M0, 32), (block_encode.E4M3, 16), (block_encode.F32_SCALE, 64)):
            if name not in ("fp4", "nf4") or scale == block_encode.F32_SCALE:
                yield f"block_encode.{name}.{scale}", block_encode.kernel(name, group, scale, False)


def retargeted(text: str, target: tuple[str, str, str]) -> str:
    """Assembly of LLVM for another processor."""
    layout = str(machine.target_machine(*target).target_data)
    text = re.sub(r'target triple = ".*"', f'target triple = "{target[0]}"', text)
    return re.sub(r'target datalayout = ".*"', f'target datalayout = "{layout}"', text)


def instructions(native: str) -> list[str]:
    """Labels and instructions of assembly, without comments and directives."""
    lines = (line.split("#")[0].split("//")[0].strip() for line in native.splitlines())
    return [line for line in lines if line and (line.endswith(":") or not line.startswith("."))]


def products(code: str) -> int:
    """How many products an instruction adds to sums."""
    name = code.split()[0]
    if name == "tdpbssd":
        return TILE_PRODUCTS
    bits = 512 if "%zmm" in code else 256 if "%ymm" in code else 128
    return bits // MULTIPLY[name] if name in MULTIPLY else 0


def inner_loops(native: str) -> Iterator[dict[str, int]]:
    """The loops without branches that multiply vectors: their instructions, the products that they add, and
    how many of the instructions move a vector to or from the stack.
    """
    block: list[str] = []
    label = ""
    for line in instructions(native):
        if line.endswith(":"):
            block, label = [], line[:-1]
            continue
        block.append(line.removeprefix("{vex}").strip())
        if not BRANCH.match(line):
            continue
        count = sum(map(products, block))
        if line.split()[-1] == label and count:
            spills = sum(bool(SPILL.search(code)) for code in block)
            yield {"instructions": len(block), "products": count, "spills": spills}
        block, label = [], ""


def described(native: str) -> dict[str, object]:
    """What the machine code calls, the widest registers that it names, how often each instruction of vectors
    is there, and its inner loops.
    """
    code = [line for line in instructions(native) if not line.endswith(":")]
    called = {
        m for line in code for m in re.findall(r"(?:movabsq\s+\$|\bbl\s+|callq?\s+\*?)([A-Za-z_]\w*)", line)
    }
    words = [line.removeprefix("{vex}").split()[0] for line in code]
    return {
        "calls": sorted(name for name in called if not name.startswith(("_ZN", "kernel"))),
        "zmm": any("%zmm" in line for line in code),
        "loops": list(inner_loops(native)),
        "instructions": {word: words.count(word) for word in sorted(set(words))},
    }


def main() -> None:
    """Prints a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--arm", action="store_true")
    parser.add_argument("--objects", type=Path)
    options = parser.parse_args()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    descriptions = {}
    if options.arm:  # numba also compiles for this processor, as if it had no instruction for halves; unused
        for name in ("__extendhfsf2", "__truncsfhf2"):
            llvm.add_symbol(name, 1)
    for name, kernel in kernels(options.all):
        text = machine.assembly(kernel.body)
        foreign = "llvm.x86." in text
        compiler = machine.target_machine(*ARM) if options.arm else machine.target_machine()
        module = llvm.parse_assembly(retargeted(text, ARM) if options.arm else text)
        descriptions[name] = {"foreign": foreign, **described(compiler.emit_assembly(module))}
        if options.objects:
            (options.objects / f"{name}.o").write_bytes(compiler.emit_object(module))
    print(json.dumps(descriptions))


if __name__ == "__main__":
    main()
