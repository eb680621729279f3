"""What the machine code of kernels holds, compiled for processors that are not here: instructions that they
have, and no others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantport_cpu import jit

UNAVAILABLE = jit.why_unavailable()
pytestmark = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE or "numba is installed")

SCRIPT = Path(__file__).parent / "machine_code.py"
X86 = "+avx2,+fma,+f16c"
WIDE = f"{X86},+avx512f,+avx512bw,+avx512dq,+avx512vl"
# name and instruction sets; then instructions that int8 and int4 hold, and that nothing holds
PROCESSORS = {
    "avx2": ("haswell", X86, {"vpmaddwd"}, {"vpdpbusd"}),
    "avx-vnni": ("alderlake", f"{X86},+avxvnni", {"vpdpbusd"}, {"vpmaddwd"}),
    "avx512": ("skylake-avx512", WIDE, {"vpmaddwd"}, {"vpdpbusd"}),
    "avx512-vnni": ("cascadelake", f"{WIDE},+avx512vnni", {"vpdpbusd"}, {"vpmaddwd"}),
    "amx": (
        "sapphirerapids",
        f"{WIDE},+avx512vnni,+amx-tile,+amx-int8",
        {"vpdpbusd"},
        {"vpmaddwd"},
    ),
    "arm": ("generic", "+neon", {"smull"}, {"vpmaddwd", "vpdpbusd"}),
}
CALLABLE = {"memcpy", "memmove", "memset"}
WAITS = {"sched_yield"}  # of kernels whose threads wait for each other


def compiled(processor: str, *flags: str) -> dict[str, dict]:
    name, features, *_ = PROCESSORS[processor]
    call = [sys.executable, str(SCRIPT), *flags, *(["--arm"] if processor == "arm" else [])]
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(processor: str, found: dict[str, dict]) -> None:
    """The instructions of a processor, and no others."""
    _, features, wanted, foreign = PROCESSORS[processor]
    is_wide = "avx512" in features
    assert wanted <= set(found["gemm_int8"]["instructions"])
    bytes_ = {"vpmaddubsw"} if "vpmaddwd" in wanted else set()
    assert wanted | bytes_ <= set(found["gemm_int4"]["instructions"])
    # as often as the four sizes of a step need them: a tile that did not fit would be loaded twice
    tiles = found.get("gemm_amx", {"instructions": {}})["instructions"]
    counts = [tiles.get(name, 0) for name in ("tdpbssd", "tileloadd")]
    assert counts == ([4 + 2 + 2 + 1, 4 + 3 + 3 + 2] if "amx" in features else [0, 0])
    multiply = "fmla" if processor == "arm" else "vfmadd231ps"
    for kernel in ("gemm_int8", "gemm_int4", "gemv_bf16", "gemv_bytes.fp8", "gemv_bytes.int8"):
        loops = found[kernel]["loops"]
        # every size of a tile; where 16 registers are just enough, LLVM may keep a constant on the stack
        assert len(loops) >= (2 if (processor, kernel) == ("arm", "gemm_int4") else 3), kernel
        assert all(loop["spills"] <= 2 for loop in loops), (kernel, loops)
    for kernel, code in found.items():
        assert set(code["calls"]) <= CALLABLE | (WAITS if kernel.startswith("token") else set()), kernel
        if kernel.startswith("gemm_gguf"):  # products of bytes are multiplied by scales of 16 bits
            check_gguf(kernel.removeprefix("gemm_gguf."), processor, code)
        else:
            assert not foreign & set(code["instructions"]), kernel
        assert is_wide or not code["zmm"], kernel
        assert processor != "arm" or not code["foreign"], kernel
        if kernel.startswith("kv_attention") and not (processor == "arm" and kernel.endswith(".1")):
            # nine products are an exponential, once for a score: its constants may lie on the stack
            assert not any(loop["spills"] for loop in code["loops"] if loop["products"] % 9), kernel
        if kernel.startswith(("gemv_b", "gemv_gguf", "gemm_int4", "gemm_fp32", "kv_attention")):
            assert multiply in code["instructions"], kernel


# Of a loop for one row of activations: instructions for a block of one row of the weight, with AVX2.
GGUF_BLOCK = {"q4_0": 19, "q8_0": 19, "q4_k": 84, "q5_k": 116, "q6_k": 101}


def check_gguf(name: str, processor: str, code: dict) -> None:
    """Products of bytes; a loop for each size of a tile, in which nothing but constants is on the stack."""
    loops, words = code["loops"], set(code["instructions"])
    assert processor == "arm" or {"vpmaddubsw", "vpmaddwd", "vpdpbusd"} & words, name
    assert min(loop["instructions"] for loop in loops) <= GGUF_BLOCK[name] or processor != "avx2", name
    assert max(loop["spills"] for loop in loops) <= 5 or processor != "avx2", name


is_x86 = sys.platform == "linux" and os.uname().machine == "x86_64"
needs_x86 = pytest.mark.skipif(not is_x86, reason="numba compiles for x86 on an x86 with Linux only")


@needs_x86
@pytest.mark.parametrize("processor", ["avx2", "amx", "arm"])
def test_a_processor_gets_its_own_instructions(processor: str) -> None:
    check(processor, compiled(processor))


@needs_x86
@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_kernel_gets_its_own_instructions(processor: str) -> None:
    found = compiled(processor, "--all")
    assert len(found) > 40
    check(processor, found)


@needs_x86
def test_a_processor_without_avx2_is_told_so() -> None:
    call = [sys.executable, "-c", "from quantport_cpu.jit import why_unavailable; print(why_unavailable())"]
    environment = os.environ | {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == "the compiled kernels need AVX2, FMA and F16C: nehalem has no AVX2, FMA, F16C"
    )
