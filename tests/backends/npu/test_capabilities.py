"""What the NPU room claims and refuses, for hardware that is not here."""

from __future__ import annotations

import pytest
import torch

from quantport.backend import Evidence, Rejected, Request, Status, WeightSpec
from quantport.planning.select_kernel import select_kernel
from quantport.plugins.registry import Registry
from quantport_npu.capabilities import ARCHS
from quantport_npu.kernels.base import from_pairs, parts, to_pairs

HOST = Registry(only=["npu"])
FORMATS = {
    "ascend310p": ("310P", "fp16 int8"),
    "ascend910b": ("A2", "fp16 bf16 int8 int4"),
    "ascend910c": ("A3", "fp16 bf16 int8 int4"),
    "ascend950": ("A5", "fp16 bf16 int8 int4 e4m3fn e5m2 mxfp8 mxfp4"),
}
A2 = {
    "int8": "native npu.quant_matmul",
    "int8_weight_only": "native npu.weight_quant_int8",
    "int4_weight_only": "native npu.weight_quant_int4",
    "int4_w4a8": "weight_only npu.weight_quant_int4",
    "int4_mse": "native npu.weight_quant_int4_offset",
    "int4_hqq": "native npu.weight_quant_int4_offset",
    "fp8_per_tensor": "weight_only torch.dequantize",
    "fp8_per_block": "weight_only torch.dequantize",
    "fp8_weight_only": "dequantize torch.dequantize",
    "mxfp8": "weight_only torch.dequantize",
    "mxfp4": "weight_only torch.dequantize",
    "mxfp4_dualscale": "weight_only torch.dequantize",
    "nf4": "dequantize torch.dequantize",
}
CHOSEN = {
    "ascend310p": {
        **A2,
        "int8": "weight_only npu.weight_quant_int8",
        "int4_weight_only": "dequantize torch.dequantize",
        "int4_mse": "dequantize torch.dequantize",
        "int4_hqq": "dequantize torch.dequantize",
        "int4_w4a8": "weight_only torch.dequantize",
    },
    "ascend910b": A2,
    "ascend910c": A2,
    "ascend950": {
        **A2,
        "fp8_per_tensor": "native npu.quant_matmul_fp8",
        "fp8_per_channel": "native npu.quant_matmul_fp8",
        "fp8_per_block": "native npu.quant_matmul_fp8_blocks",
        "fp8_weight_only": "native npu.weight_quant_fp8",
        "mxfp8": "native npu.quant_matmul_mxfp8",
        "mxfp8:floor": "native npu.quant_matmul_mxfp8_floor",
        "mxfp8:rceil": "native npu.quant_matmul_mxfp8_rceil",
        "mxfp4": "native npu.quant_matmul_mxfp4",
        "mxfp4:floor": "native npu.quant_matmul_mxfp4_floor",
        "mxfp4_w4a8": "native npu.quant_matmul_mxfp4_w4a8",
        "mxfp4_dualscale": "native npu.dual_level_quant_matmul",
    },
}


def asked(name: str, scheme: str, n: int = 64, k: int = 256, dtype: torch.dtype | None = None) -> Request:
    device = HOST.device(f"npu:{name}")
    return Request(WeightSpec(HOST.schemes[scheme], n, k), "linear", device, dtype or device.arch.compute)


def why_not(kernel: str, request: Request) -> str:
    verdict = next(k for k in HOST.kernels("npu") if k.name == kernel).verdict(request)
    return " ".join(map(str, verdict.reasons)) if isinstance(verdict, Rejected) else ""


@pytest.mark.parametrize("name", ARCHS)
def test_facts(name):
    arch = ARCHS[name]
    assert (arch.family, arch.native) == (FORMATS[name][0], set(FORMATS[name][1].split()))
    assert (arch.kind, arch.name) == ("npu", name)
    assert arch.source
    assert arch.title
    assert arch.compute is (torch.float16 if name == "ascend310p" else torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "scheme"), [(name, scheme) for name, table in CHOSEN.items() for scheme in table]
)
def test_choices(name, scheme):
    choice = select_kernel(asked(name, scheme), HOST.kernels("npu"))
    assert f"{choice.status} {choice.kernel}" == CHOSEN[name][scheme]
    own = choice.kernel.startswith("npu.")
    assert choice.claim.evidence is (Evidence.SIMULATED if own else Evidence.DECLARED)
    assert choice.status is Status.NATIVE or choice.reasons


def test_the_310p_has_no_scales_of_tokens():
    assert "no npu_dynamic_quant" in why_not("npu.quant_matmul", asked("ascend310p", "int8"))
    assert "no bfloat16" in why_not(
        "npu.weight_quant_int8", asked("ascend310p", "int8", dtype=torch.bfloat16)
    )


def test_offsets_need_the_range_of_bf16():
    said = why_not("npu.weight_quant_int4_offset", asked("ascend910b", "int4_mse", dtype=torch.float16))
    assert "offsets beyond the range of float16" in said


def test_a2_has_no_fp8_and_no_mx():
    assert "no e4m3fn matrix instruction" in why_not("npu.quant_matmul_fp8", asked("ascend910b", "fp8"))
    assert "no mxfp4 matrix instruction" in why_not(
        "npu.dual_level_quant_matmul", asked("ascend910b", "mxfp4_dualscale")
    )


@pytest.mark.parametrize(
    ("kernel", "scheme", "n", "k", "said"),
    [
        ("npu.quant_matmul", "int8", 64, 65536, "K up to 65535"),
        ("npu.weight_quant_int4", "int4_weight_only", 65544, 256, "N up to 65535"),
        ("npu.weight_quant_int4", "int4_weight_only", 33, 256, "33 is no multiple of 8"),
        ("npu.weight_quant_int4", "int4_weight_only", 64, 128, "up to K - 1, not of 128"),
        ("npu.quant_matmul_mxfp4", "mxfp4", 64, 201, "even K from 4 on, two elements to a byte, not 201"),
    ],
)
def test_limits(kernel, scheme, n, k, said):
    assert said in why_not(kernel, asked("ascend950", scheme, n, k))


def test_many_output_channels_are_several_products():
    assert not why_not("npu.quant_matmul", asked("ascend910b", "int8", 151936, 1024))
    assert parts(65535) == [slice(0, 65535)]
    assert parts(65536) == [slice(0, 65408), slice(65408, 65536)]
    assert parts(151936) == [slice(0, 65408), slice(65408, 130816), slice(130816, 151936)]


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_scales_in_pairs(groups):
    scale = torch.arange(5 * groups, dtype=torch.uint8).view(5, groups)
    pairs = to_pairs(scale)
    assert pairs.shape == (5, -(-groups // 2), 2)
    assert torch.equal(from_pairs(pairs, groups), scale)
