"""Dispatch: what a quantized module costs over calling its raw operator by hand; and what ``import quantport`` costs over torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from common import markdown, write

from quantport import numerics
from quantport.kernels.base import Request, WeightSpec
from quantport.modules import QuantExperts, QuantLinear
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


@torch.no_grad()
def bare_dispatch(n: int = 64, k: int = 128) -> tuple[float, float]:
    """Microseconds of a module, and of ``quantport::linear_no_grad`` that compiled code calls, where the kernel does nothing: all
    that dispatching costs, without the noise of a kernel."""
    spec, kernel = (
        WeightSpec(default_registry().schemes["int8"], n, k),
        default_registry().kernel("torch.dequantize"),
    )
    layer = QuantLinear(kernel, spec)
    layer.set_weight("", numerics.quantize_weight(torch.randn(n, k).bfloat16(), spec.scheme))
    x, packed, handle = torch.randn(1, k).bfloat16(), list(layer.packed()), layer.bound[""].handle
    call, out = torch.ops.quantport.linear_no_grad.default, torch.empty(1, n, dtype=torch.bfloat16)
    with patch.object(kernel, "run", lambda *_: out):
        rounds = [
            (
                per_call(lambda: layer(x)),
                per_call(lambda: call(x, packed, None, handle)),
                per_call(lambda: kernel.run(x, packed, None, spec)),
            )
            for _ in range(15)
        ]
    module, operator, raw = (statistics.median(each) * 1e6 for each in zip(*rounds, strict=True))
    return module - raw, operator - raw


def look_up() -> float:
    """Microseconds to look up a scheme with an option."""
    schemes = default_registry().schemes
    return statistics.median(per_call(lambda: schemes["mxfp4:floor"]) for _ in range(15)) * 1e6


@torch.no_grad()
def compiled_experts(
    name: str, experts: int = 128, hidden: int = 2048, wide: int = 768
) -> tuple[str, float, float]:
    """Kernel, microseconds of a layer of experts for one token, and of the same compiled."""
    scheme, device = default_registry().schemes[name], default_registry().device("cpu")
    up, down = WeightSpec(scheme, wide, hidden), WeightSpec(scheme, hidden, wide)
    chosen = select_kernel([Request(s, "moe", device) for s in (up, down)], default_registry().kernels("cpu"))
    layer = QuantExperts(default_registry().kernel(chosen.kernel), up, down, experts, "silu")
    for weight, spec in layer.specs.items():
        layer.set_weight(weight, numerics.quantize_weight(torch.randn(spec.n, spec.k).bfloat16(), scheme))
    routed = (
        torch.randn(1, hidden).bfloat16(),
        torch.randperm(experts)[None, :8],
        torch.full((1, 8), 0.125).bfloat16(),
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    pairs = [
        (per_call(lambda: layer(*routed), 1), per_call(lambda: compiled(*routed), 1)) for _ in range(120)
    ]
    eager, graph = (statistics.median(p) * 1e6 for p in zip(*pairs[20:], strict=True))
    return chosen.kernel, eager, graph


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
    module, operator = bare_dispatch()
    for name, cost in (("the module", module), ("`quantport::linear_no_grad`", operator)):
        rows.append(
            [
                f"{name} over a kernel that does nothing",
                "",
                "",
                "",
                f"{cost:.1f}",
                "✅" if cost <= 5 else "❌ (need 5 us)",
            ]
        )
    rows.append(['`schemes["mxfp4:floor"]`', "", "", "", f"{look_up():.2f}", ""])
    for name in ("int8", "int4_weight_only"):
        kernel, eager, graph = compiled_experts(name)
        shown = f"{graph / eager:.2f}x compiled"
        rows.append(
            [
                f"128 experts, {name}",
                kernel,
                f"{eager:.0f}",
                "",
                shown,
                "✅" if graph <= 1.1 * eager else "❌",
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
