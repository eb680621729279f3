"""What the room packs, through the weight-only operators of Intel's archived extension on the CPU.

The same words and codes go to ATen's and to vllm-xpu-kernels' operators for Intel GPUs. ``make ipex`` runs
the real wheel, in an environment of its own. An emulation, written from the extension's C++
(csrc/cpu/aten/kernels/Woq*Krnl.cpp and csrc/cpu/jit/cpu/kernels/LinearWoqPacked.cpp at v2.8.0+cpu), runs
everywhere.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from quantport import numerics
from quantport.backend import WeightSpec
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases
from quantport_xpu import vendor
from quantport_xpu.kernels.weight_only import XpuInt4Pack, XpuInt8Pack

NEEDED = "2.8.0"
INT8, INT4 = 1, 2  # WOQ_DTYPE_INT8, WOQ_DTYPE_INT4 of woq_defines.h
MODES = (
    0,
    0,
    # LOWP_MODE_NONE: multiplied in the dtype of the activations; act_quant_mode: LOWP_MODE_INT8 reads it
)
SCHEMAS = {
    "ipex_prepack::weight_only_qlinear_prepack": (
        "(Tensor W, int W_dtype, int[] W_shape, Tensor scales, Tensor? zero_points, Tensor? B, "
        "Tensor? g_idx, int? batch_size, "
        "int group_size, int lowp_mode, int act_quant_mode, bool cache_weight_for_large_batch=False)"
    ),
    "ipex_prepack::weight_only_qlinear_prepack_int4": (
        "(Tensor W, Tensor scales, Tensor? zeros, Tensor? B, Tensor? g_idx, int? batch_size, int "
        "group_size, int lowp_mode, "
        "int act_quant_mode, bool cache_weight_for_large_batch=False, int weight_format=0)"
    ),
    "torch_ipex::ipex_woq_linear": "(Tensor input, Tensor W_prepack)",
}


class Emulated:
    """A packed weight: int8 codes, or bytes of two codes with the first in the low half; scales and offsets
    ``[N]`` or ``[N, groups]``.
    """

    def __init__(
        self, w, w_dtype, shape, scales, zero_points, bias, g_idx, batch, group, lowp_mode, act_quant_mode
    ):
        n, k = shape
        assert (g_idx, batch, lowp_mode, act_quant_mode) == (None, None, *MODES)
        assert scales.dtype is torch.float32
        if w_dtype == INT8:
            assert (w.shape, w.dtype, zero_points) == ((n, k), torch.int8, None)
            codes = w.float()
        else:
            assert (w.shape, w.dtype) == ((n, k // 2), torch.uint8)
            codes = torch.stack((w & 15, w >> 4), -1).view(n, k).float()
        if group > 0:
            assert scales.shape == zero_points.shape == (n, k // group)
            codes = codes - zero_points.float().repeat_interleave(group, 1)
            scales = scales.repeat_interleave(group, 1)
        else:
            assert scales.shape == (n,)
            scales = scales.unsqueeze(1)
        self.weight, self.bias = codes * scales, bias

    def get_data_handle(self):
        return self

    def run(self, x):
        y = x.float() @ self.weight.t()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def prepack_int4(w, scales, zeros, bias, g_idx, batch, group, lowp_mode, act_quant_mode):
    """Packs the plain format, whose words are read as bytes."""
    w = w.view(torch.uint8)
    return Emulated(
        w,
        INT4,
        [w.shape[0], w.shape[1] * 2],
        scales.float(),
        zeros,
        bias,
        g_idx,
        batch,
        group,
        lowp_mode,
        act_quant_mode,
    )


EMULATION = SimpleNamespace(
    ipex_prepack=SimpleNamespace(
        weight_only_qlinear_prepack=Emulated, weight_only_qlinear_prepack_int4=prepack_int4
    ),
    torch_ipex=SimpleNamespace(ipex_woq_linear=lambda x, handle: handle.run(x)),
)


def installed() -> bool:
    """Whether the wheel is installed, with the torch that it is for: with any other it fails or ends the
    process.
    """
    try:
        found = metadata.version(vendor.EXTENSION)
    except metadata.PackageNotFoundError:
        return False
    return found.startswith(NEEDED) and torch.__version__.startswith(NEEDED)


@pytest.fixture
def wheel():
    if not installed():
        pytest.skip(f"no intel-extension-for-pytorch {NEEDED} over a CPU build of torch {NEEDED}: make ipex")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        __import__(vendor.EXTENSION)
    return torch.ops


@pytest.fixture(params=["emulated", "real"])
def ops(request):
    return EMULATION if request.param == "emulated" else request.getfixturevalue("wheel")


def job(scheme, n, k, dtype):
    spec = WeightSpec(BUILTIN[scheme], n, k)
    stored = numerics.quantize_weight(cases.plain(n, k), spec.scheme)
    x, bias = cases.activations(5, k, dtype), cases.bias(n, dtype)
    return spec, stored, x, bias, numerics.linear(x, stored, spec.scheme, bias)


TOLERANCE = {torch.float32: 2.0**-14, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(64, 256), (33, 384), (1, 128)])
@pytest.mark.parametrize("scheme", ["int4_weight_only", "int4_weight_only_g32"])
def test_int4_words_of_the_gpu_are_those_of_the_cpu(ops, scheme, shape, dtype):
    """Words, scales and zeros as for ``aten::_weight_int4pack_mm_with_scales_and_zeros``; the CPU needs
    groups last.
    """
    spec, stored, x, bias, expected = job(scheme, *shape, dtype)
    words, scale, zero = XpuInt4Pack().pack(stored, spec)
    scale, zero = scale.t().contiguous().float(), zero.t().contiguous().float()
    end = (bias, None, None, spec.scheme.weight.group_size, *MODES)
    packed = [
        ops.ipex_prepack.weight_only_qlinear_prepack(
            words.view(torch.uint8), INT4, list(shape), scale, zero, *end
        )
    ]
    if scale.shape[1] > 1:  # prepack_int4 squeezes its scales, and then asks for their second dimension
        packed.append(ops.ipex_prepack.weight_only_qlinear_prepack_int4(words, scale, zero, *end))
    for context in packed:
        y = ops.torch_ipex.ipex_woq_linear(x, context.get_data_handle())
        assert y.dtype is dtype
        assert cases.relative_error(y, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(64, 256), (33, 97), (1, 128)])
def test_int8_codes_of_the_gpu_are_those_of_the_cpu(ops, shape, dtype):
    spec, stored, x, bias, expected = job("int8_weight_only", *shape, dtype)
    codes, scale = XpuInt8Pack().pack(stored, spec)
    prepack = ops.ipex_prepack.weight_only_qlinear_prepack
    context = prepack(codes, INT8, list(shape), scale.view(-1), None, bias, None, None, -1, *MODES)
    y = ops.torch_ipex.ipex_woq_linear(x, context.get_data_handle())
    assert cases.relative_error(y, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("mistake", ["nibbles", "zeros", "groups"])
def test_a_planted_mistake_is_caught(ops, mistake):
    spec, stored, x, bias, expected = job("int4_weight_only_g32", 64, 256, torch.float32)
    words, scale, zero = XpuInt4Pack().pack(stored, spec)
    data, scale, zero = words.view(torch.uint8), scale.t().contiguous().float(), zero.t().contiguous().float()
    if mistake == "nibbles":
        data = data >> 4 | data << 4
    elif mistake == "zeros":
        zero = zero - 1
    else:
        scale = scale.flip(1)
    end = (bias, None, None, 32, *MODES)
    context = ops.ipex_prepack.weight_only_qlinear_prepack(data, INT4, [64, 256], scale, zero, *end)
    assert (
        cases.relative_error(ops.torch_ipex.ipex_woq_linear(x, context.get_data_handle()), expected) > 2.0**-7
    )


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.usefixtures("wheel")
def test_the_wheel_has_the_operators_as_they_are_called(name):
    (schema,) = torch._C._jit_get_schemas_for_operator(name)
    assert str(schema).partition(" -> ")[0] == name + SCHEMAS[name]
