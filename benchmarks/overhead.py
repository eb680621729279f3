"""Dispatch: what a quantized module costs over calling its raw operator by hand; and what ``import quantport`` costs over torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from common import markdown, write
from torch import Tensor, nn

from quantport import numerics
from quantport.kernels.base import Request, WeightSpec
from quantport.modules import QuantExperts, QuantLinear
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import default_registry

# one of each kernel; what ``torch.dequantize`` runs takes a hundred milliseconds a layer, beside which a graph is nothing
EXPERTS = (
    "int8",
    "int8_weight_only",
    "fp8_weight_only",
    "int4_weight_only",
    "int4_w4a8",
    "mxfp4",
    "nvfp4",
    "nf4",
)


def per_call(call: Callable[[], object], count: int = 3000) -> float:
    """Seconds of this thread, which does it all: what else the machine does is not in them."""
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


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


class Layers(nn.Module):
    """A layer of experts called once for each of some routings: a graph of as many layers."""

    def __init__(self, experts: QuantExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, routings: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        return [self.experts(x, index, weights) for index in routings]


def build_experts(name: str, experts: int = 128, hidden: int = 2048, wide: int = 768) -> QuantExperts:
    scheme, device = default_registry().schemes[name], default_registry().device("cpu")
    up, down = WeightSpec(scheme, wide, hidden), WeightSpec(scheme, hidden, wide)
    chosen = select_kernel([Request(s, "moe", device) for s in (up, down)], default_registry().kernels("cpu"))
    layer = QuantExperts(default_registry().kernel(chosen.kernel), up, down, experts, "silu")
    for weight, spec in layer.specs.items():
        layer.set_weight(weight, numerics.quantize_weight(torch.randn(spec.n, spec.k).bfloat16(), scheme))
    return layer


@torch.no_grad()
def compiled_experts(experts: QuantExperts, layers: int = 1, rounds: int = 120) -> tuple[float, float]:
    """Microseconds of a layer of experts for one token, and of the same compiled, in a graph of so many layers; each of them
    takes experts of its own."""
    chosen = torch.randperm(experts.num_experts)[: 8 * layers].view(layers, 1, 8)
    x, weights = torch.randn(1, experts.gate_up.k).bfloat16(), torch.full((1, 8), 0.125).bfloat16()
    model, given = Layers(experts), (x, chosen.unbind(), weights)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pairs = [
        (per_call(lambda: model(*given), 1), per_call(lambda: compiled(*given), 1)) for _ in range(rounds)
    ]
    eager, graph = (statistics.median(p) * 1e6 / layers for p in zip(*pairs[rounds // 6 :], strict=True))
    return eager, graph


@torch.no_grad()
def entered_graph(experts: QuantExperts) -> float:
    """Microseconds of a compiled graph of one operator over that operator, each after a layer of experts, which leaves nothing
    else in cache: what torch itself takes to enter a graph."""
    x, index, weights = torch.randn(1, experts.gate_up.k), torch.arange(8)[None], torch.full((1, 8), 0.125)
    eager, compiled = nn.ReLU(), torch.compile(nn.ReLU(), fullgraph=True, backend="aot_eager")

    def after_experts(call: nn.Module) -> float:
        experts(x.bfloat16(), index, weights.bfloat16())
        return per_call(lambda: call(x), 1)

    pairs = [(after_experts(compiled), after_experts(eager)) for _ in range(120)][20:]
    return statistics.median(graph - alone for graph, alone in pairs) * 1e6


def experts_rows() -> list[list[str]]:
    """A layer of experts by itself in a graph, and in one of eight, for a scheme of each way through the CPU room."""
    rows = []
    for name in EXPERTS:
        experts = build_experts(name)
        for layers in (1, 8):
            eager, graph = compiled_experts(experts, layers)
            ratio = f"{graph / eager:.2f}x compiled"
            verdict = "✅" if graph <= 1.1 * eager else "❌ (need 1.1x)"
            title = f"128 experts, {name}, " + (
                "alone in a graph" if layers == 1 else f"{layers} layers in it"
            )
            rows.append([title, experts.kernel.name, f"{eager:.0f}", "", ratio, verdict])
    rows.append(
        ["a graph of one operator, after such a layer", "", "", "", f"{entered_graph(experts):.0f}", ""]
    )
    return rows


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
    rows += experts_rows()
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
