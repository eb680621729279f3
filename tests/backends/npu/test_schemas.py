"""Every call against every schema that its operator has had: the operator takes it, or the kernel refuses and
says what the build lacks.

The schemas are the registration strings in the wheels torch-npu 2.6.0.post5 to 2.14.0 on PyPI.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantport import numerics
from quantport.backend import Request, WeightSpec
from quantport.plugins.registry import Registry
from quantport.testing import cases
from quantport_npu import vendor
from quantport_npu.kernels import grouped
from quantport_npu.kernels.base import NpuKernel
from quantport_npu.kernels.grouped import NpuGrouped

M, N, K = 5, 64, 256
HOST = Registry(only=["npu"])
DEVICES = [replace(HOST.device(f"npu:{name}"), simulated=False) for name in ("ascend950", "ascend910b")]

NEW = (
    'npu_dynamic_block_quant(Tensor x, *, float min_scale=0.0, str round_mode="rint", int dst_type=1, '
    "int row_block_size=1, "
    "int col_block_size=128, float dst_type_max=0.0) -> (Tensor y, Tensor scale)",
    'npu_dynamic_dual_level_mx_quant(Tensor input, *, Tensor? smooth_scale=None, str round_mode="rint") '
    "-> (Tensor, Tensor, Tensor)",
    'npu_dynamic_mx_quant(Tensor input, *, int axis=-1, str round_mode="rint", int dst_type=296, '
    "int block_size=32, "
    "int? scale_alg=0, float dst_type_max=0.0, float max_low_bound=0.0) -> (Tensor, Tensor)",
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? "
    "dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.0) -> (Tensor, Tensor)',
    "npu_dual_level_quant_matmul(Tensor x1, Tensor x2, Tensor x1_level0_scale, Tensor "
    "x2_level0_scale, Tensor x1_level1_scale, "
    "Tensor x2_level1_scale, *, Tensor? bias=None, int output_dtype=15) -> Tensor",
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? "
    "pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, int? "
    "pertoken_scale_dtype=None, "
    "int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? "
    "antiquant_offset=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int "
    "antiquant_group_size=0, int inner_precise=0, "
    "int? weight_dtype=None) -> Tensor",
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
    "npu_format_cast(Tensor input, int acl_format, *, int? customize_dtype=None, int? "
    "input_dtype=None) -> Tensor",
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, "
    "Tensor[]? offset=None, "
    "Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, Tensor[]? "
    "per_token_scale=None, Tensor? group_list=None, "
    "Tensor[]? activation_input=None, Tensor[]? activation_quant_scale=None, Tensor[]? "
    "activation_quant_offset=None, "
    "int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? "
    "tuning_config=None, "
    "int? output_dtype=None, int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None, "
    "int? per_token_scale_dtype=None) -> Tensor[]",
    "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor "
    "x_scale, Tensor group_list, *, "
    "Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None, Tensor? bias=None, int? dequant_mode=0, "
    "int? dequant_dtype=6, int? quant_mode=0, int? quant_dtype=1, int? group_list_type=0, int[]? "
    "tuning_config=None, "
    "int? x_dtype=None, int? weight_dtype=None, int? weight_scale_dtype=None, int? "
    "x_scale_dtype=None) -> (Tensor, Tensor)",
)
OLD = (
    'npu_dynamic_block_quant(Tensor x, *, float min_scale=0.0, str round_mode="rint", int dst_type=1, '
    "int row_block_size=1, "
    "int col_block_size=128) -> (Tensor y, Tensor scale)",
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, "
    "ScalarType? dst_type=None) "
    "-> (Tensor, Tensor)",
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? "
    "pertoken_scale=None, "
    "Tensor? bias=None, ScalarType? output_dtype=None, SymInt[]? group_sizes=None) -> Tensor",
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? "
    "antiquant_offset=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int "
    "antiquant_group_size=0, int inner_precise=0) "
    "-> Tensor",
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor",
    "npu_format_cast(Tensor input, int acl_format, int? customize_dtype=None) -> Tensor",
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, "
    "Tensor[]? offset=None, "
    "Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, Tensor[]? "
    "per_token_scale=None, Tensor? group_list=None, "
    "Tensor[]? activation_input=None, Tensor[]? activation_quant_scale=None, Tensor[]? "
    "activation_quant_offset=None, "
    "int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0, int[]? "
    "tuning_config=None, "
    "ScalarType? output_dtype=None) -> Tensor[]",
)
BUILDS = {
    "2.14.0": NEW,
    "2.9.1": tuple(form.replace(", float max_low_bound=0.0", "") for form in NEW),
    "2.8.0": OLD,
}
TAKEN_BY_OLD = {
    "npu.quant_matmul",
    "npu.weight_quant_int8",
    "npu.weight_quant_int4",
    "npu.weight_quant_int4_offset",
    "npu.grouped_matmul",
    "npu.grouped_weight_int8",
    "npu.grouped_weight_int4",
}
KERNELS = [k for k in HOST.kernels("npu") if isinstance(k, NpuKernel)]
PAIRS = [(k, s) for k in KERNELS for s in HOST.schemes.values() if k.serves(s)]


def bodies():
    """Operators that return results of the right shapes: only how they are called is tested here."""
    y = torch.zeros(M, N, dtype=torch.bfloat16)
    scale = torch.zeros(M, K // 32, 2, dtype=torch.uint8)
    return {
        "npu_dynamic_block_quant": lambda x, **_: (x.to(torch.float8_e4m3fn), torch.zeros(M, K // 128)),
        "npu_dynamic_dual_level_mx_quant": lambda x, **_: (x.to(torch.uint8), torch.zeros(M, 1), scale),
        "npu_dynamic_mx_quant": lambda x, **_: (x.to(torch.uint8), scale),
        "npu_dynamic_quant": lambda x, **_: (x.to(torch.int8), torch.zeros(M)),
        "npu_dual_level_quant_matmul": lambda *_, **__: y.clone(),
        "npu_quant_matmul": lambda *_, **__: y.clone(),
        "npu_weight_quant_batchmatmul": lambda *_, **__: y.clone(),
        "npu_convert_weight_to_int4pack": lambda w, *_: torch.zeros(
            w.shape[0], w.shape[1] // 8, dtype=torch.int32
        ),
        "npu_format_cast": lambda x, *_, **__: x.clone(),
        "npu_grouped_matmul": lambda *_, **__: [y.clone()],
        "npu_grouped_matmul_swiglu_quant_v2": lambda *_, **__: (
            torch.zeros(M, N, dtype=torch.int8),
            torch.zeros(M),
        ),
    }


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """The operators of a build in a namespace of their own, since torch_npu may be installed."""
    space = f"npu_of_{request.param.replace('.', '_')}"
    library, made = torch.library.Library(space, "DEF"), bodies()
    for form in BUILDS[request.param]:
        library.define(form)
        library.impl(form.partition("(")[0], made[form.partition("(")[0]], "CompositeExplicitAutograd")
    monkeypatch.setattr(torch.ops, "npu", getattr(torch.ops, space), raising=False)
    vendor.lacking.cache_clear()
    yield request.param
    vendor.lacking.cache_clear()
    library._destroy()


@pytest.mark.parametrize(("kernel", "scheme"), PAIRS, ids=[f"{k.name}-{s.name}" for k, s in PAIRS])
def test_a_call_is_taken_or_refused_before(build, kernel, scheme):
    spec, layer = WeightSpec(scheme, N, K), kernel.layers[0]
    device = next(
        d for d in DEVICES if not isinstance(kernel, NpuGrouped) or d.arch.family in kernel.families
    )
    reasons = kernel.reasons_against(Request(spec, layer, device, torch.bfloat16))
    assert bool(reasons) == (build == "2.8.0" and kernel.name not in TAKEN_BY_OLD), reasons
    if reasons:
        assert all("torch_npu" in reason.text for reason in reasons)
        return
    packed = kernel.pack(numerics.quantize_weight(cases.plain(N, K), scheme), spec)
    x, bias = cases.activations(M, K, torch.bfloat16), cases.bias(N, torch.bfloat16)
    assert kernel.run(x, packed, bias, spec).shape == (M, N)


@pytest.mark.parametrize("name", ["int8", "fp8", "mxfp8"])
def test_the_launch_with_swiglu_is_taken_or_left_out(build, name, monkeypatch):
    monkeypatch.setattr(grouped, "family", lambda: "A5")
    scheme = HOST.schemes[name]
    kernel = next(k for k in KERNELS if isinstance(k, NpuGrouped) and k.serves(scheme))
    specs = WeightSpec(scheme, N, K), WeightSpec(scheme, N, N)
    up, down = (kernel.pack(numerics.quantize_weight(cases.plain(s.n, s.k), scheme), s) for s in specs)
    x, offsets = cases.activations(M, K, torch.bfloat16), torch.tensor([0, M], dtype=torch.int32)
    y = kernel.run_gated(
        x, offsets, kernel.prepare_grouped([up, up], 2), kernel.prepare_grouped([down]), specs, "silu"
    )
    assert (y is None) if build == "2.8.0" else y.shape == (M, N)
