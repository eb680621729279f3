"""Experts on a simulated NPU: one launch for all of them, and wrong calls are refused."""

from simulator.need import simulated

simulated("A2", "A3", "950")

from dataclasses import replace

import pytest
import torch
from simulator import register
from simulator.register import A5, E2M1, E8M0

from quantport.backend import Accepted, Request, WeightSpec
from quantport.modules import ExpertForm
from quantport.plugins.registry import default_registry
from quantport.testing import builders, cases

NPU = torch.ops.npu
ON_950 = register.family() == A5
PLAIN = ["npu_dynamic_quant", "npu_grouped_matmul"] * 2
WEIGHTS = ["npu_grouped_matmul"] * 2
GATED = ["npu_grouped_matmul_swiglu_quant_v2", "npu_grouped_matmul"]
MX = ["npu_dynamic_mx_quant", "npu_grouped_matmul"] * 2
LAUNCHES = {
    "int8": PLAIN,
    "int8_weight_only": WEIGHTS,
    "int4_weight_only": WEIGHTS,
    "int4_weight_only_g32": WEIGHTS,
}
LAUNCHES_OF_950 = {
    "int8": ["npu_dynamic_quant", *GATED],
    "fp8_per_channel": ["npu_dynamic_quant", *GATED],
    "fp8_per_tensor": ["npu_dynamic_quant", *GATED],
    "mxfp8": ["npu_dynamic_mx_quant", *GATED],
    "mxfp8:floor": ["npu_dynamic_mx_quant", *GATED],
    "mxfp8:rceil": MX,
    "mxfp4": MX,
    "mxfp4:floor": MX,
}
LAUNCHES = LAUNCHES_OF_950 if ON_950 else LAUNCHES


def layer(name, activation="silu"):
    """A layer of four experts with the kernel that a plan would choose, and its reference."""
    scheme = default_registry().schemes[name]
    request = Request(
        WeightSpec(scheme, builders.INTERMEDIATE, builders.HIDDEN), "moe", default_registry().device("npu")
    )
    kernel = next(k for k in default_registry().kernels("npu") if isinstance(k.verdict(request), Accepted))
    module, reference = builders.experts(kernel, scheme, request.device)
    module.form = ExpertForm(activation)
    return module, reference


def inputs(rows):
    return [t.to("npu") for t in builders.routed(rows, torch.bfloat16)]


@pytest.mark.parametrize("scheme", LAUNCHES)
def test_all_experts_take_one_launch_for_each_product(scheme):
    module, _ = layer(scheme)
    module(*inputs(9))
    register.CALLS.clear()
    module(*inputs(9))
    assert LAUNCHES[scheme] == register.CALLS


# whose scales of activations are declared to differ
@pytest.mark.parametrize("scheme", [s for s in LAUNCHES if s != "mxfp8"])
def test_experts_are_right(scheme):
    module, reference = layer(scheme)
    error = cases.relative_error(module(*inputs(9)).cpu(), reference(*builders.routed(9, torch.bfloat16)))
    assert error <= 4 * module.kernel.tolerance


@pytest.mark.skipif(not ON_950, reason="only the 950 multiplies, gates and quantizes in one launch")
@pytest.mark.parametrize("scheme", [s for s, launches in LAUNCHES_OF_950.items() if GATED[0] in launches])
def test_one_launch_gives_what_two_give(scheme, monkeypatch):
    module, _ = layer(scheme)
    fused = module(*inputs(9)).cpu()
    monkeypatch.setattr(type(module.kernel), "fits_fused", lambda self, spec: False)
    register.CALLS.clear()
    assert cases.relative_error(fused, module(*inputs(9)).cpu()) <= 4 * module.kernel.tolerance
    assert GATED[0] not in register.CALLS


@pytest.mark.parametrize("scheme", LAUNCHES)
def test_every_weight_is_held_once(scheme):
    module, _ = layer(scheme)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.buffers()}
    slack = 32 * len(memory)  # of the allocator
    assert 0 <= sum(memory.values()) - sum(t.nbytes for t in module.buffers()) <= slack
    assert len(memory) == 2 * len(module.packed("0.gate_proj"))


@pytest.mark.skipif(not ON_950, reason="only the 950 multiplies, gates and quantizes in one launch")
@pytest.mark.parametrize("scheme", ["int8", "mxfp8"])
def test_other_activations_and_training_take_the_plain_way(scheme):
    module, _ = layer(scheme, "gelu_tanh")
    given = inputs(5)
    register.CALLS.clear()
    module(*given)
    assert "npu_grouped_matmul_swiglu_quant_v2" not in register.CALLS
    assert register.CALLS.count("npu_grouped_matmul") == 2


@pytest.mark.skipif(not ON_950, reason="only the 950 multiplies, gates and quantizes in one launch")
def test_groups_whose_width_mx_does_not_take_go_the_plain_way():
    kernel = layer("mxfp8")[0].kernel
    scheme = default_registry().schemes["mxfp8"]
    assert [kernel.fits_fused(WeightSpec(scheme, n, 128)) for n in (32, 64, 96, 128)] == [
        False,
        True,
        False,
        True,
    ]


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="npu")


def ends(*stops, dtype=torch.int64):
    return torch.tensor(stops, dtype=dtype, device="npu")


def int8(**changed):
    given = {
        "x": [zeros(6, 64, dtype=torch.int8)],
        "weight": [zeros(3, 32, 64, dtype=torch.int8).transpose(1, 2)],
        "scale": [zeros(3, 32, dtype=torch.bfloat16)],
        "per_token_scale": [zeros(6)],
        "group_list": ends(2, 2, 6),
        "split_item": 3,
        "group_type": 0,
        "output_dtype": torch.bfloat16,
    }
    return NPU.npu_grouped_matmul(**given | changed)[0]


def mx(**changed):
    byte = torch.uint8
    four = {"x_dtype": E2M1, "weight_dtype": E2M1, "scale_dtype": E8M0, "per_token_scale_dtype": E8M0}
    given = {
        "x": [zeros(6, 32, dtype=byte)],
        "weight": [zeros(3, 32, 32, dtype=byte).transpose(1, 2)],
        "scale": [zeros(3, 32, 1, 2, dtype=byte).transpose(1, 2)],
        "per_token_scale": [zeros(6, 1, 2, dtype=byte)],
        **four,
    }
    return int8(**given | changed)


def gated(**changed):
    given = {
        "x": zeros(6, 64, dtype=torch.int8),
        "weight": [zeros(3, 32, 64, dtype=torch.int8).transpose(1, 2)],
        "weight_scale": [zeros(3, 32)],
        "x_scale": zeros(6),
        "group_list": ends(2, 2, 6),
        "dequant_dtype": torch.float32,
    }
    return NPU.npu_grouped_matmul_swiglu_quant_v2(**given | changed)[0]


MISTAKES = {
    "a group list of int32": lambda: int8(group_list=ends(2, 2, 6, dtype=torch.int32)),
    "counts instead of sums": lambda: int8(group_list=ends(2, 0, 4)),
    "offsets that begin with 0": lambda: int8(group_list=ends(0, 2, 2, 6)),
    "rows of no group": lambda: int8(group_list=ends(2, 2, 5)),
    "no group type": lambda: int8(group_type=None),
    "a result for each group": lambda: int8(split_item=0),
    "weights that are not transposed": lambda: int8(weight=[zeros(3, 32, 64, dtype=torch.int8)]),
    "a view with gaps": lambda: int8(weight=[zeros(3, 64, 64, dtype=torch.int8)[:, :, ::2]]),
    "scales of fp32 for results of bf16": lambda: int8(scale=[zeros(3, 32)]),
    "scales of one matrix": lambda: int8(scale=[zeros(32, dtype=torch.bfloat16)]),
    "scales of tokens of rank 2": lambda: int8(per_token_scale=[zeros(6, 1)]),
    "a tensor where a list is asked": lambda: int8(x=zeros(6, 64, dtype=torch.int8)),
    "another keyword": lambda: int8(pertoken_scale=[zeros(6)]),
}
MISTAKES_OF_950 = {
    "e2m1 bytes without their dtype": lambda: mx(x_dtype=None, weight_dtype=None),
    "scales of MX that are not transposed": lambda: mx(scale=[zeros(3, 32, 1, 2, dtype=torch.uint8)]),
    "scales of MX that are not in pairs": lambda: mx(per_token_scale=[zeros(6, 2, dtype=torch.uint8)]),
    "e2m1 weights packed along N": lambda: mx(weight=[zeros(3, 64, 16, dtype=torch.uint8)]),
    "SwiGLU in another dtype": lambda: gated(dequant_dtype=torch.bfloat16),
    "SwiGLU of two tensors of weights": lambda: gated(weight=[zeros(3, 64, 16, dtype=torch.int8)] * 2),
    "SwiGLU with the modes of MX": lambda: gated(dequant_mode=2, quant_mode=2),
    "SwiGLU into another element": lambda: gated(quant_dtype=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("call", [int8, mx, gated] if ON_950 else [int8])
def test_the_right_call_is_taken(call):
    assert len(call()) == 6


@pytest.mark.parametrize("mistake", {**MISTAKES, **(MISTAKES_OF_950 if ON_950 else {})})
def test_a_mistake_is_refused(mistake):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        {**MISTAKES, **MISTAKES_OF_950}[mistake]()


@pytest.mark.skipif(ON_950, reason="the 950 has it")
def test_the_operators_of_the_950_are_refused_elsewhere():
    for call in (mx, gated):
        with pytest.raises(RuntimeError):
            call()


def test_a_grouped_kernel_refuses_linear_layers_by_name():
    kernel = next(k for k in default_registry().kernels("npu") if k.name == "npu.grouped_matmul")
    request = Request(
        WeightSpec(default_registry().schemes["int8"], 64, 64), "moe", default_registry().device("npu")
    )
    assert isinstance(kernel.verdict(request), Accepted)
    assert "it is for moe layers" in " ".join(
        map(str, kernel.verdict(replace(request, layer="linear")).reasons)
    )
