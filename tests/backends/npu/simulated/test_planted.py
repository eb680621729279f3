"""Mistakes planted in the room's kernels: each changes the call of one operator, and each is caught."""

from simulator.need import simulated

simulated("950")

import pytest
import torch

from quantport import numerics
from quantport.backend import Accepted, Request, WeightSpec
from quantport.plugins.registry import default_registry
from quantport.testing import cases

N, K, ROWS = 64, 256, 6
SCHEMES = {
    "npu.quant_matmul": "int8",
    "npu.quant_matmul_fp8": "fp8_per_channel",
    "npu.quant_matmul_fp8_blocks": "fp8_per_block",
    "npu.quant_matmul_mxfp8": "mxfp8",
    "npu.quant_matmul_mxfp4": "mxfp4",
    "npu.dual_level_quant_matmul": "mxfp4_dualscale",
    "npu.weight_quant_int8": "int8_weight_only",
    "npu.weight_quant_int4": "int4_weight_only_g32",
    "npu.grouped_matmul": "int8",
    "npu.grouped_matmul_mxfp4": "mxfp4",
}
QUANT, WEIGHT_ONLY, DUAL, GROUPED = (
    "npu_quant_matmul",
    "npu_weight_quant_batchmatmul",
    "npu_dual_level_quant_matmul",
    "npu_grouped_matmul",
)


def changed(**by):
    """Changes keyword arguments of a call: to another value, or by a function of the right one."""
    return lambda args, named: (
        args,
        named | {key: v(named[key]) if callable(v) else v for key, v in by.items()},
    )


def without(*names):
    return lambda args, named: (args, {key: value for key, value in named.items() if key not in names})


def argument(i, change):
    """Changes one positional argument of a call."""
    return lambda args, named: ((*args[:i], change(args[i]), *args[i + 1 :]), named)


def rows(t):
    return t.t().contiguous()


def each(change):
    return lambda tensors: [change(t) for t in tensors]


# kernel, operator, what it does to the call
MISTAKES = {
    "int8: another output dtype": ("npu.quant_matmul", QUANT, changed(output_dtype=torch.float32)),
    "int8: scales of rank 2": ("npu.quant_matmul", QUANT, argument(2, lambda t: t[:, None])),
    "int8: no scales of tokens": ("npu.quant_matmul", QUANT, without("pertoken_scale")),
    "int8: 16-bit activations": ("npu.quant_matmul", QUANT, argument(0, lambda t: t.bfloat16())),
    "fp8: the weight not transposed": ("npu.quant_matmul_fp8", QUANT, argument(1, lambda t: t.t())),
    "fp8: scales in 16 bits": ("npu.quant_matmul_fp8", QUANT, argument(2, lambda t: t.bfloat16())),
    "fp8: activations in int8": ("npu.quant_matmul_fp8", "npu_dynamic_quant", changed(dst_type=torch.int8)),
    "blocks: scales not transposed": ("npu.quant_matmul_fp8_blocks", QUANT, argument(2, rows)),
    "blocks: no group sizes": ("npu.quant_matmul_fp8_blocks", QUANT, without("group_sizes")),
    "blocks: blocks of 64": (
        "npu.quant_matmul_fp8_blocks",
        "npu_dynamic_block_quant",
        changed(col_block_size=64),
    ),
    "mxfp8: scales not transposed": (
        "npu.quant_matmul_mxfp8",
        QUANT,
        argument(2, lambda t: t.transpose(0, 1)),
    ),
    "mxfp8: scales not in pairs": ("npu.quant_matmul_mxfp8", QUANT, argument(2, lambda t: t.flatten(1))),
    "mxfp8: no group sizes": ("npu.quant_matmul_mxfp8", QUANT, without("group_sizes")),
    "mxfp8: sizes of W4A8": ("npu.quant_matmul_mxfp8", QUANT, changed(group_sizes=[0, 0, 32])),
    "mxfp8: bytes that are not said to be e8m0": (
        "npu.quant_matmul_mxfp8",
        QUANT,
        without("scale_dtype", "pertoken_scale_dtype"),
    ),
    "mxfp4: bytes that are not said to be e2m1": ("npu.quant_matmul_mxfp4", QUANT, without("x2_dtype")),
    "mxfp4: activations in fp8": (
        "npu.quant_matmul_mxfp4",
        "npu_dynamic_mx_quant",
        lambda a, n: (a, {"dst_type": 24}),
    ),
    "mxfp4: algorithm 1": ("npu.quant_matmul_mxfp4", "npu_dynamic_mx_quant", changed(scale_alg=1)),
    "dual scale: the weight in rows": (
        "npu.dual_level_quant_matmul",
        "npu_format_cast",
        argument(1, lambda t: 2),
    ),
    "dual scale: outer scales not transposed": ("npu.dual_level_quant_matmul", DUAL, argument(3, rows)),
    "dual scale: levels exchanged": (
        "npu.dual_level_quant_matmul",
        DUAL,
        lambda a, n: ((*a[:2], *a[4:6], *a[2:4]), n),
    ),
    "int8 weight-only: scales in fp32": (
        "npu.weight_quant_int8",
        WEIGHT_ONLY,
        argument(2, lambda t: t.float()),
    ),
    "int8 weight-only: the weight not transposed": (
        "npu.weight_quant_int8",
        WEIGHT_ONLY,
        argument(1, lambda t: t.t()),
    ),
    "int4: no group": ("npu.weight_quant_int4", WEIGHT_ONLY, without("antiquant_group_size")),
    "int4: scales not transposed": ("npu.weight_quant_int4", WEIGHT_ONLY, argument(2, rows)),
    "experts: no scales of tokens": ("npu.grouped_matmul", GROUPED, without("per_token_scale")),
    "experts: ends in int32": ("npu.grouped_matmul", GROUPED, changed(group_list=lambda t: t.int())),
    "experts: counts for ends": ("npu.grouped_matmul", GROUPED, changed(group_list=lambda t: t - 1)),
    "experts: the weight not transposed": (
        "npu.grouped_matmul",
        GROUPED,
        argument(1, each(lambda t: t[:, : N // 2])),
    ),
    "experts: another output dtype": ("npu.grouped_matmul", GROUPED, changed(output_dtype=torch.float32)),
    "experts: bytes that are not said to be e2m1": (
        "npu.grouped_matmul_mxfp4",
        GROUPED,
        without("weight_dtype"),
    ),
    "experts: bytes that are not said to be e8m0": (
        "npu.grouped_matmul_mxfp4",
        GROUPED,
        without("scale_dtype"),
    ),
}


def run(name):
    """Runs a kernel from the stored weight to the result."""
    kernel, scheme, device = (
        default_registry().kernel(name),
        default_registry().schemes[SCHEMES[name]],
        default_registry().device("npu"),
    )
    spec = WeightSpec(scheme, N, K)
    assert isinstance(
        kernel.verdict(Request(spec, "moe" if "grouped" in name else "linear", device, torch.bfloat16)),
        Accepted,
    )
    stored = numerics.quantize_weight(cases.plain(N, K), scheme)
    packed = kernel.pack({key: t.to("npu") for key, t in stored.items()}, spec)
    return kernel.run(cases.activations(ROWS, K, torch.bfloat16).to("npu"), packed, None, spec).cpu()


@pytest.mark.parametrize("name", SCHEMES)
def test_the_kernel_as_it_is_runs(name):
    assert run(name).shape == (ROWS, N)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_kernel_with_a_mistake_fails(mistake, monkeypatch):
    kernel, operator, plant = MISTAKES[mistake]
    right, calls = getattr(torch.ops.npu, operator), []

    def wrong(*args, **named):
        args, named = plant(args, named)
        calls.append(operator)
        return right(*args, **named)

    wrong.default = right.default  # for the simulator, which asks its shape function
    monkeypatch.setattr(torch.ops.npu, operator, wrong)
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(kernel)
    assert calls
