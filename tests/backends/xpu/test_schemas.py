"""Every operator that the room calls, against ATen's registry or the vendors' schemas, and calls that are one
step away from a right one.

The vendors' operators are registered with the schemas that the room ships, so that torch's dispatcher refuses
wrong keywords, types and numbers of arguments; their emulations refuse wrong dtypes, ranks and layouts.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from xpu_runs import BMG, RUNS

import quantport_xpu.kernels
from quantport import numerics
from quantport.backend import WeightSpec, aten
from quantport.scheme.catalog import BUILTIN
from quantport.testing import cases
from quantport_xpu import vendor
from quantport_xpu.kernels.mx import XpuMxfp4Quantized

M, N, K = 4, 128, 256
E8M0, FP8, FP4 = torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.float4_e2m1fn_x2
ATEN = {
    "aten._int_mm": "(Tensor self, Tensor mat2) -> Tensor",
    "aten._scaled_mm": (
        "(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, Tensor? bias=None, Tensor? "
        "scale_result=None, "
        "ScalarType? out_dtype=None, bool use_fast_accum=False) -> Tensor"
    ),
    "aten._weight_int8pack_mm": "(Tensor self, Tensor mat2, Tensor scales) -> Tensor",
    "aten._weight_int4pack_mm_with_scales_and_zeros": (
        "(Tensor self, Tensor mat2, int qGroupSize, Tensor qScale, Tensor qZeros) -> Tensor"
    ),
}
OPERATORS = ATEN | vendor.SCHEMAS


@pytest.fixture(autouse=True)
def _operators(xpu_operators_registered):
    """Emulations of the vendors' operators."""


def written():
    """Names of the operators in the sources of the room's kernels, and of those of core that they derive
    from.
    """
    files = [*Path(quantport_xpu.kernels.__file__).parent.glob("*.py"), Path(aten.__file__)]
    text = "\n".join(path.read_text() for path in files)
    called = set(re.findall(r"torch\.ops\.(\w+\.\w+(?:\.xpu)?)", text))
    return called | {f"aten.{name}" for name in re.findall(r"torch\.(_\w+)\(", text)}


class Calls(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def test_every_operator_in_the_text_has_its_schema_here():
    assert written() == set(OPERATORS)


@pytest.mark.parametrize("name", ATEN)
def test_aten_has_it_as_it_is_called(name):
    (schema,) = [
        s for s in torch._C._jit_get_schemas_for_operator(name.replace(".", "::")) if not s.overload_name
    ]
    assert vendor.fits(schema, ATEN[name])


def test_every_operator_is_called_by_some_kernel():
    seen = set()
    for kernel, scheme, _, shapes in (*RUNS, (XpuMxfp4Quantized(), "mxfp4:rceil", BMG, ((64, 256),))):
        spec = WeightSpec(BUILTIN[scheme], *shapes[0])
        packed = kernel.pack(numerics.quantize_weight(cases.plain(spec.n, spec.k), spec.scheme), spec)
        with Calls() as calls:
            kernel.run(
                cases.activations(M, spec.k, torch.bfloat16), packed, cases.bias(spec.n, torch.bfloat16), spec
            )
        seen |= calls.seen
    # The operator of the CPU would take its place: the emulation calls that, see xpu_operators.int8pack_mm.
    assert set(OPERATORS) - seen == set()


def x(dtype=torch.bfloat16):
    return cases.activations(M, K, dtype)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def call(name, given, changed):
    return vendor.overload(torch.ops, name)(**given | changed)


def fp8(**changed):
    given = {
        "A": ones(M, K, dtype=FP8),
        "B": ones(N, K, dtype=FP8).t(),
        "out_dtype": torch.bfloat16,
        "A_scale_": ones(M, K // 32, dtype=E8M0),
        "B_scale_": ones(K // 32, N, dtype=E8M0),
        "bias_": None,
    }
    return call("_xpu_C.fp8_gemm", given, changed)


def fp8_w8a16(**changed):
    given = {"A": x(), "B": ones(N, K, dtype=FP8).t(), "B_scale_": ones(N), "bias_": None}
    return call("_xpu_C.fp8_gemm_w8a16", given, changed)


def fp4(**changed):
    given = {
        "A": ones(M, K // 2, dtype=torch.uint8).view(FP4),
        "B": ones(N, K // 2, dtype=torch.uint8).view(FP4).t(),
        "A_scale": ones(M, K // 32, dtype=E8M0),
        "B_scale": ones(K // 32, N, dtype=E8M0),
        "out_dtype": torch.bfloat16,
        "bias_": None,
    }
    return call("_xpu_C.fp4_gemm", given, changed)


def w4a16(**changed):
    given = {
        "A": x(),
        "B": ones(N, K // 8, dtype=torch.int32).t(),
        "bias": None,
        "B_scale": ones(K // 32, N, dtype=torch.bfloat16),
        "B_zp": ones(1, dtype=torch.int8),
        "group_size": 32,
        "g_idx": None,
    }
    return call("_xpu_C.int4_gemm_w4a16", given, changed)


def w4a8(**changed):
    given = {
        "A_": ones(M, K, dtype=torch.int8),
        "A_scale": ones(1, dtype=torch.float16),
        "A_zp": torch.zeros(1, dtype=torch.int32),
        "B": ones(N, K // 8, dtype=torch.int32).t(),
        "B_scale": ones(K // 32, N, dtype=torch.float16),
        "B_zp": ones(1, dtype=torch.int8),
        "group_size": 32,
        "g_idx": None,
        "bias": None,
    }
    return call("_xpu_C.int4_gemm_w4a8", given, changed)


def quantizer(**changed):
    codes = ones(M, K // 2, dtype=torch.uint8)
    given = {"input": x(), "output_q": codes, "output_s": ones(M, K // 32), "group_size": 32, "eps": 1e-10}
    call("_C.per_token_group_quant_mxfp4", given, changed)
    return codes


def marlin(out=None, x_=None, words=None, scale=None, group=32):
    out = ones(M, N, dtype=torch.bfloat16) if out is None else out
    words = ones(K // 8, N, dtype=torch.int32) if words is None else words
    scale = ones(K // 32, N, dtype=torch.uint8) if scale is None else scale
    torch.ops.torch_ipex.mm_mxfp4_out_marlin.xpu(out, x() if x_ is None else x_, words, scale, group)
    return out


def int8(**changed):
    given = {"self": x(), "mat2": ones(N, K, dtype=torch.int8), "scales": ones(N)} | changed
    return torch.ops.aten._weight_int8pack_mm(given.pop("self"), given.pop("mat2"), *given.values())


def int4(**changed):
    given = {
        "mat2": ones(N, K // 8, dtype=torch.int32),
        "qGroupSize": 32,
        "qScale": ones(K // 32, N, dtype=torch.bfloat16),
        "qZeros": ones(K // 32, N, dtype=torch.int8),
    }
    return torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(
        changed.pop("self", x()), **given | changed
    )


def scaled(**changed):
    given = {"scale_a": ones(M, 1), "scale_b": ones(1, N), "out_dtype": torch.bfloat16}
    return torch._scaled_mm(
        ones(M, K, dtype=FP8), changed.pop("mat2", ones(N, K, dtype=FP8).t()), **given | changed
    )


MISTAKES = {
    "a keyword of torch": lambda: fp8(scale_a=ones(M, 1)),
    "scales of two dtypes": lambda: fp8(B_scale_=ones(K // 32, N)),
    "scales of B by rows of the weight": lambda: fp8(B_scale_=ones(N, K // 32, dtype=E8M0)),
    "exponents as bytes": lambda: fp8(
        A_scale_=ones(M, K // 32, dtype=torch.uint8), B_scale_=ones(K // 32, N, dtype=torch.uint8)
    ),
    "an fp8 weight that is not transposed": lambda: fp8(B=ones(N, K, dtype=FP8)),
    "fp32 results": lambda: fp8(out_dtype=torch.float32),
    "activations that nobody quantized": lambda: fp8(A=x()),
    "scales of an fp8 weight in bf16": lambda: fp8_w8a16(B_scale_=ones(N, dtype=torch.bfloat16)),
    "an argument of the extension's fp8_gemm_w8a16": lambda: fp8_w8a16(trans_B=True),
    "e2m1 codes as bytes": lambda: fp4(A=ones(M, K // 2, dtype=torch.uint8)),
    "e2m1 scales by rows of the weight": lambda: fp4(B_scale=ones(N, K // 32, dtype=E8M0)),
    "scales of NVFP4": lambda: fp4(A_scale=ones(M, K // 16, dtype=FP8), B_scale=ones(K // 16, N, dtype=FP8)),
    "no scales": lambda: fp4(A_scale=None),
    "a zero for each group": lambda: w4a16(B_zp=ones(K // 32, N, dtype=torch.int8)),
    "scales of int4 in fp32": lambda: w4a16(B_scale=ones(K // 32, N)),
    "words along N": lambda: w4a16(B=ones(K // 8, N, dtype=torch.int32)),
    "a group as a number with a fraction": lambda: w4a16(group_size=32.0),
    "scales of W4A8 in bf16, which are read as fp16": lambda: w4a8(
        B_scale=ones(K // 32, N, dtype=torch.bfloat16)
    ),
    "scales of tokens in fp32": lambda: w4a8(A_scale=ones(1)),
    "a zero of tokens in int8": lambda: w4a8(A_zp=torch.zeros(1, dtype=torch.int8)),
    "scales of tokens of rank 1": lambda: w4a8(
        A_scale=ones(M, dtype=torch.float16), A_zp=torch.zeros(M, dtype=torch.int32)
    ),
    "groups of 16": lambda: quantizer(group_size=16),
    "scales as exponents": lambda: quantizer(output_s=ones(M, K // 32, dtype=torch.uint8)),
    "activations with strides": lambda: quantizer(input=cases.activations(K, M, torch.bfloat16).t()),
    "fp16 read as bf16": lambda: marlin(x_=x(torch.float16)),
    "exponents by rows of the weight": lambda: marlin(scale=ones(N, K // 32, dtype=torch.uint8)),
    "words with strides": lambda: marlin(words=ones(N, K // 8, dtype=torch.int32).t()),
    "another group": lambda: marlin(group=128),
    "int8 scales in bf16": lambda: int8(scales=ones(N, dtype=torch.bfloat16)),
    "int8 codes as bytes": lambda: int8(mat2=ones(N, K, dtype=torch.uint8)),
    "int8 scales of another length": lambda: int8(scales=ones(K)),
    "a fourth argument": lambda: int8(bias=ones(N)),
    "a keyword of another torch": lambda: int4(group_size=32),
    "zeros in bf16": lambda: int4(qZeros=ones(K // 32, N, dtype=torch.bfloat16)),
    "fp16 activations, bf16 scales": lambda: int4(self=x(torch.float16)),
    "row scales as a vector": lambda: scaled(scale_a=ones(M)),
    "the name of a scale in another version": lambda: scaled(scale=ones(1)),
    "int8 times bytes": lambda: torch._int_mm(
        ones(32, K, dtype=torch.int8), ones(N, K, dtype=torch.uint8).t()
    ),
}


@pytest.mark.parametrize("right", [fp8, fp8_w8a16, fp4, w4a16, w4a8, quantizer, marlin, int8, int4, scaled])
def test_the_right_call_is_taken(right):
    assert right().shape in ((M, N), (M, K // 2))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake):
    with pytest.raises((RuntimeError, AssertionError, TypeError, ValueError)):
        MISTAKES[mistake]()
