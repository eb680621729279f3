"""The CUDA room's kernels on fake CUDA tensors: shape, dtype and device, through torch's own shape functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from quantport.backend import WeightSpec
from quantport.catalog import BUILTIN
from quantport_cuda.kernels.matmul import CudaIntMM, CudaScaledMM


def _view(x, index):
    for dim, item in enumerate(index if isinstance(index, tuple) else (index,)):
        x = x.unsqueeze(dim) if item is None else torch.ops.aten.slice(x, dim, item.start, item.stop)
    return x


class AtenOnly(TorchFunctionMode):
    """Calls ATen past the Python bindings: some of them ask for a device guard, which a CPU-only torch lacks for cuda."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            return _view(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_(_view(args[0], args[1]), args[2])
        if func in (Tensor.contiguous, Tensor.copy_):
            return getattr(torch.ops.aten, func.__name__)(*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@pytest.mark.parametrize(
    ("kernel", "scheme"), [(CudaScaledMM(), "fp8_per_tensor"), (CudaScaledMM(), "fp8_per_channel"), (CudaIntMM(), "int8")]
)
def test_run(kernel, scheme, rows, bias):
    spec = WeightSpec(BUILTIN[scheme], 64, 96)
    with FakeTensorMode(), AtenOnly():
        stored = {name: torch.empty(shape, dtype=t, device="cuda") for name, (shape, t) in spec.scheme.layout(64, 96).items()}
        packed = kernel.pack(stored, spec)
        x = torch.empty(rows, 96, dtype=torch.bfloat16, device="cuda")
        y = kernel.run(x, packed, torch.empty(64, dtype=torch.bfloat16, device="cuda") if bias else None, spec)
        back = kernel.unpack(packed, spec)
    assert (y.shape, y.dtype, y.device.type) == ((rows, 64), torch.bfloat16, "cuda")
    assert {name: (t.shape, t.dtype) for name, t in back.items()} == spec.scheme.layout(64, 96)


def test_int8_answers_in_fp16_where_bf16_does_not_exist():
    spec = WeightSpec(BUILTIN["int8"], 64, 96)
    with FakeTensorMode(), AtenOnly():
        stored = {name: torch.empty(shape, dtype=t, device="cuda") for name, (shape, t) in spec.scheme.layout(64, 96).items()}
        kernel = CudaIntMM()
        y = kernel.run(torch.empty(4, 96, dtype=torch.float16, device="cuda"), kernel.pack(stored, spec), None, spec)
    assert (y.shape, y.dtype) == ((4, 64), torch.float16)


def test_torch_itself_refuses_what_the_kernel_refuses():
    spec = WeightSpec(BUILTIN["fp8_per_channel"], 72, 96)
    kernel = CudaScaledMM()
    with FakeTensorMode(), AtenOnly():
        stored = {name: torch.empty(shape, dtype=t, device="cuda") for name, (shape, t) in spec.scheme.layout(72, 96).items()}
        packed = kernel.pack(stored, spec)
        with pytest.raises(RuntimeError, match="divisible by 16"):
            kernel.run(torch.empty(4, 96, dtype=torch.bfloat16, device="cuda"), packed, None, spec)
