"""Dispatch: what a quantized module costs over calling its raw operator by hand; and what ``import quantport`` costs over torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import markdown, write

from quantport import numerics
from quantport.kernels.base import Request, WeightSpec
from quantport.modules import QuantLinear
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import default_registry


def per_call(call: Callable[[], object], count: int = 3000) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


@torch.no_grad()
def dispatch(name: str, n: int = 64, k: int = 128) -> tuple[str, float, float]:
    """Kernel, microseconds of the module, and of the kernel's body called by hand, on a layer too small to hide it."""
    spec = WeightSpec(default_registry().schemes[name], n, k)
    kernel = default_registry().kernel(
        select_kernel(
            Request(spec, "linear", default_registry().device("cpu")), default_registry().kernels("cpu")
        ).kernel
    )
    layer = QuantLinear(kernel, spec)
    layer.set_weight("", numerics.quantize_weight(torch.randn(n, k).bfloat16(), spec.scheme))
    x, packed = torch.randn(1, k).bfloat16(), layer.packed()
    pairs = [
        (per_call(lambda: layer(x)), per_call(lambda: kernel.run(x, packed, None, spec))) for _ in range(15)
    ]
    module, raw = (statistics.median(p) * 1e6 for p in zip(*pairs, strict=True))
    return kernel.name, module, raw


def imports(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in default_registry().schemes:
        kernel, module, raw = dispatch(name)
        rows.append(
            [
                name,
                kernel,
                f"{module:.1f}",
                f"{raw:.1f}",
                f"{module - raw:.1f}",
                "✅" if module - raw <= 10 else "❌",
            ]
        )
    codes = ("import torch", "import torch, quantport", "import torch, quantport; quantport.load")
    runs = [[imports(code) for code in codes] for _ in range(5)]
    extra, first = (statistics.median(run[i] - run[0] for run in runs) * 1e3 for i in (1, 2))
    rows.append(
        [
            "import quantport",
            "",
            "",
            "",
            f"{extra:.0f} ms over torch",
            "✅" if extra <= 100 else "❌ (need 100 ms)",
        ]
    )
    rows.append(["the same, and first use", "", "", "", f"{first:.0f} ms over torch", ""])
    columns = ["scheme", "kernel", "module, us", "raw, us", "difference", "<= 10 us"]
    write("overhead.md", markdown("Overhead of the module call, one row, 64x128", columns, rows))


if __name__ == "__main__":
    main()
