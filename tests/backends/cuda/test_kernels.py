"""The CUDA room's kernels on fake CUDA tensors: shape, dtype and device, through torch's own shape
functions.
"""

from __future__ import annotations

import pytest
import torch

from quantport.backend import Kernel, WeightSpec
from quantport.scheme.catalog import BUILTIN
from quantport.testing.fakes import fake_tensors
from quantport_cuda.kernels.block_scaled import CudaScaledMX, CudaScaledNV
from quantport_cuda.kernels.int4 import CudaInt4Pack
from quantport_cuda.kernels.int8 import CudaIntMM
from quantport_cuda.kernels.scaled import CudaScaledBlocks, CudaScaledMM

RUNS = [
    (CudaScaledMM(), "fp8_per_tensor", (64, 96)),
    (CudaScaledMM(), "fp8_per_channel", (64, 96)),
    (CudaScaledBlocks(), "fp8_per_block", (256, 384)),
    (CudaScaledMX(), "mxfp8", (64, 96)),
    (CudaScaledNV(), "nvfp4", (64, 96)),
    (CudaIntMM(), "int8", (64, 96)),
    (CudaInt4Pack(), "int4_weight_only_g32", (64, 96)),
    (CudaInt4Pack(), "int4_mse", (64, 128)),
]
ANY = ("fp8_per_block", "mxfp8", "nvfp4", "int8")  # answer in every dtype
V2 = pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="torch 2.10")
if V2.args[0]:
    RUNS = [run for run in RUNS if run[1] != "fp8_per_block"]
IDS = [scheme for _, scheme, _ in RUNS]


def stored(spec: WeightSpec) -> dict[str, torch.Tensor]:
    layout = spec.scheme.layout(spec.n, spec.k)
    return {name: torch.empty(shape, dtype=dtype, device="cuda") for name, (shape, dtype) in layout.items()}


def activations(rows: int, spec: WeightSpec, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(rows, spec.k, dtype=dtype, device="cuda")


@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@pytest.mark.parametrize(("kernel", "scheme", "shape"), RUNS, ids=IDS)
def test_run(kernel, scheme, shape, rows):
    spec = WeightSpec(BUILTIN[scheme], *shape)
    with fake_tensors():
        packed = kernel.pack(stored(spec), spec)
        bias = torch.empty(spec.n, dtype=torch.bfloat16, device="cuda")
        ys = [kernel.run(activations(rows, spec), packed, b, spec) for b in (None, bias)]
        back = kernel.unpack(packed, spec)
    assert [(y.shape, y.dtype, y.device.type) for y in ys] == [((rows, spec.n), torch.bfloat16, "cuda")] * 2
    assert {name: (t.shape, t.dtype) for name, t in back.items()} == spec.scheme.layout(spec.n, spec.k)


@pytest.mark.parametrize(("kernel", "scheme", "shape"), [run for run in RUNS if run[1] in ANY])
def test_the_answer_has_the_dtype_of_the_activations(kernel, scheme, shape):
    spec = WeightSpec(BUILTIN[scheme], *shape)
    with fake_tensors():
        y = kernel.run(activations(4, spec, torch.float16), kernel.pack(stored(spec), spec), None, spec)
    assert (y.shape, y.dtype) == ((4, spec.n), torch.float16)


class Plain(Kernel):
    """Keeps the stored layout, which the operator does not take."""

    def pack(self, stored_weight, spec):
        return Kernel.pack(self, stored_weight, spec)


class PlainMX(Plain, CudaScaledMX):
    pass


class PlainNV(Plain, CudaScaledNV):
    pass


class PlainBlocks(Plain, CudaScaledBlocks):
    pass


class PlainInt4(Plain, CudaInt4Pack):
    pass


class RowMajor(CudaScaledMM):
    """Passes its weight as a row-major ``[K, N]``."""

    def run(self, x, packed, bias, spec):
        return super().run(
            x,
            (torch.empty_like(packed[0].t(), memory_format=torch.contiguous_format).t(), packed[1]),
            bias,
            spec,
        )


@pytest.mark.parametrize(
    ("kernel", "scheme", "shape", "said"),
    [
        (PlainMX(), "mxfp8", (64, 96), "scale_b should have 512 elements, got 192"),
        (PlainNV(), "nvfp4", (64, 96), "scale_b should have 1024 elements, got 384"),
        pytest.param(
            PlainBlocks(), "fp8_per_block", (256, 384), r"scale b must have shape \[4.0, 2\]", marks=V2
        ),
        (PlainInt4(), "int4_mse", (64, 128), "w must be a 4D tensor"),
        (RowMajor(), "fp8_per_channel", (64, 96), "mat2 must be col_major"),
        (CudaScaledMM(), "fp8_per_channel", (72, 96), "divisible by 16"),
    ],
)
def test_torch_refuses_a_wrong_layout(kernel, scheme, shape, said):
    spec = WeightSpec(BUILTIN[scheme], *shape)
    with fake_tensors():
        packed = kernel.pack(stored(spec), spec)
        with pytest.raises(RuntimeError, match=said):
            kernel.run(activations(4, spec), packed, None, spec)
