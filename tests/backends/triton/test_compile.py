"""``torch.compile`` of quantized layers that run on Triton: one graph for any number of rows.

The kernels run in Triton's interpreter on the CPU, through the operator of the module as on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from quantport import numerics
from quantport.kernels.base import WeightSpec
from quantport.modules import QuantLinear
from quantport.plugins.registry import default_registry
from quantport.testing import cases

HIDDEN, INNER = 32, 64
ROWS = (1, 2, 7, 64)
RUNS = [
    ("cuda.triton_weight_only", "int4_weight_only_g32"),
    ("cuda.triton_fp8", "fp8_per_channel"),
    *(
        pytest.param(*run, marks=pytest.mark.slow)
        for run in (("cuda.triton_weight_only", "mxfp4"), ("cuda.triton_int8", "int8"))
    ),
]


class Mlp(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x))) + x


def linear(kernel: str, scheme: str, n: int, k: int) -> QuantLinear:
    spec = WeightSpec(default_registry().schemes[scheme], n, k)
    module = QuantLinear(
        default_registry().kernel(kernel),
        spec,
        nn.Parameter(cases.bias(n, torch.bfloat16), requires_grad=False),
    )
    module.set_weight("", numerics.quantize_weight(cases.plain(n, k), spec.scheme))
    return module


def quantized(kernel: str, scheme: str) -> Mlp:
    return Mlp(linear(kernel, scheme, INNER, HIDDEN), linear(kernel, scheme, HIDDEN, INNER)).eval()


def plain() -> Mlp:
    return Mlp(nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)).bfloat16().eval()


def graphs(model: Mlp, rows: tuple[int, ...], unbacked: bool = False) -> list[int]:
    """Number of graphs after each number of rows; every result must be that of eager mode, bit for bit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    out = []
    try:
        with torch.no_grad():
            for m in rows:
                x = cases.activations(m, HIDDEN, torch.bfloat16)
                if unbacked:
                    torch._dynamo.decorators.mark_unbacked(x, 0)
                assert cases.same_bits(compiled(x), model(x)), m
                out.append(counter.frame_count)
    finally:
        torch._dynamo.reset()
    return out


@pytest.mark.parametrize(("kernel", "scheme"), RUNS)
def test_as_many_graphs_as_without_quantization(kernel, scheme):
    """For any model, torch makes one graph for one row and another for all other numbers."""
    asked = (*ROWS, 7, 1)
    assert graphs(quantized(kernel, scheme), asked) == graphs(plain(), asked) == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("kernel", "scheme"), RUNS)
def test_one_graph_where_torch_may_assume_nothing(kernel, scheme):
    assert graphs(quantized(kernel, scheme), ROWS, unbacked=True) == [1] * 4


def test_a_model_that_asks_for_the_number_of_rows_would_be_found():
    class Picky(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.shape[0] > 5 else 1)

    model = Picky(linear(*RUNS[0], INNER, HIDDEN), linear(*RUNS[0], HIDDEN, INNER)).eval()
    assert graphs(model, ROWS)[-1] == 3
