"""The XPU room's kernels on fake XPU tensors: shape, dtype and device, through torch's own shape functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from quantport.backend import WeightSpec
from quantport.catalog import BUILTIN
from quantport_xpu.kernels.matmul import XpuIntMM, XpuScaledMM


def _view(x, index):
    for dim, item in enumerate(index if isinstance(index, tuple) else (index,)):
        x = x.unsqueeze(dim) if item is None else torch.ops.aten.slice(x, dim, item.start, item.stop)
    return x


class AtenOnly(TorchFunctionMode):
    """Calls ATen past the Python bindings: some of them ask for a device guard, which a CPU-only torch lacks for xpu."""

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
    ("kernel", "scheme"), [(XpuScaledMM(), "fp8_per_tensor"), (XpuScaledMM(), "fp8_per_channel"), (XpuIntMM(), "int8")]
)
def test_run(kernel, scheme, rows, bias):
    spec = WeightSpec(BUILTIN[scheme], 64, 96)
    with FakeTensorMode(), AtenOnly():
        stored = {name: torch.empty(shape, dtype=t, device="xpu") for name, (shape, t) in spec.scheme.layout(64, 96).items()}
        packed = kernel.pack(stored, spec)
        x = torch.empty(rows, 96, dtype=torch.bfloat16, device="xpu")
        y = kernel.run(x, packed, torch.empty(64, dtype=torch.bfloat16, device="xpu") if bias else None, spec)
        back = kernel.unpack(packed, spec)
    assert (y.shape, y.dtype, y.device.type) == ((rows, 64), torch.bfloat16, "xpu")
    assert {name: (t.shape, t.dtype) for name, t in back.items()} == spec.scheme.layout(64, 96)
