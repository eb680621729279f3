"""Wrong calls: each is one step away from a right one, and each is refused."""

from simulator.need import simulated

simulated("950")

import pytest
import torch
from simulator import register
from simulator.register import E2M1, E8M0

from quantport_npu import vendor

M, N, K = 4, 64, 256
NPU = torch.ops.npu


def x(dtype=torch.bfloat16):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(0)).to(dtype).to("npu")


def int8(**changed):
    q, token = NPU.npu_dynamic_quant(x(), dst_type=torch.int8)
    weight = NPU.npu_format_cast(torch.ones(K, N, dtype=torch.int8, device="npu"), 29)
    given = {
        "x1": q,
        "x2": weight,
        "scale": torch.ones(N, device="npu"),
        "pertoken_scale": token,
        "output_dtype": torch.bfloat16,
    }
    return NPU.npu_quant_matmul(**given | changed)


def mx(element=E2M1, **changed):
    q, token = NPU.npu_dynamic_mx_quant(x(), dst_type=element)
    scale = torch.full((K // 64, N, 2), 127, dtype=torch.uint8, device="npu")
    weight = torch.zeros(N, K // 2, dtype=torch.uint8, device="npu").t()
    given = {
        "x1": q,
        "x2": weight,
        "scale": scale,
        "pertoken_scale": token,
        "output_dtype": torch.bfloat16,
        "x1_dtype": E2M1,
        "x2_dtype": E2M1,
        "scale_dtype": E8M0,
        "pertoken_scale_dtype": E8M0,
        "group_sizes": [1, 1, 32],
    }
    return NPU.npu_quant_matmul(**given | changed)


def int4(**changed):
    words = NPU.npu_convert_weight_to_int4pack(torch.ones(K, N, dtype=torch.int32, device="npu"))
    scale = torch.ones(K // 32, N, dtype=torch.bfloat16, device="npu")
    return NPU.npu_weight_quant_batchmatmul(
        **{"x": x(), "weight": words, "antiquant_scale": scale, "antiquant_group_size": 32} | changed
    )


def fp8(**changed):
    weight = torch.ones(N, K, dtype=torch.float8_e4m3fn).to("npu").t()
    given = {"x": x(), "weight": weight, "antiquant_scale": torch.ones(N, dtype=torch.bfloat16, device="npu")}
    return NPU.npu_weight_quant_batchmatmul(**given | changed)


def dual(**changed):
    codes, level0, level1 = NPU.npu_dynamic_dual_level_mx_quant(x())
    tiles = NPU.npu_format_cast(
        torch.zeros(N, K // 2, dtype=torch.int8, device="npu"), 29, customize_dtype=torch.int8
    )
    given = {
        "x1": codes,
        "x2": tiles,
        "x1_level0_scale": level0,
        "x2_level0_scale": torch.ones(1, N, device="npu"),
        "x1_level1_scale": level1,
        "x2_level1_scale": torch.full((N, K // 64, 2), 127, dtype=torch.uint8, device="npu"),
    }
    return NPU.npu_dual_level_quant_matmul(**given | changed)


def npu(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="npu")


MISTAKES = {
    "a keyword that the schema has not": lambda: int8(per_token_scale=npu(M)),
    "scales of tokens of rank 2": lambda: int8(pertoken_scale=npu(M, 1)),
    "a scale for each input instead of output": lambda: int8(scale=npu(K)),
    "the weight not transposed": lambda: int8(x2=npu(N, K, dtype=torch.int8)),
    "16-bit activations that nobody quantized": lambda: int8(x1=x()),
    "a bias of another length": lambda: int8(bias=npu(K)),
    "a weight left on the host": lambda: int8(x2=torch.ones(K, N, dtype=torch.int8)),
    "e2m1 bytes without their dtype": lambda: mx(x1_dtype=None, x2_dtype=None),
    "another dtype constant for e8m0": lambda: mx(scale_dtype=E2M1),
    "group sizes of another recipe": lambda: mx(group_sizes=[1, 128, 128]),
    "no group sizes": lambda: mx(group_sizes=None),
    "scales that are not in pairs": lambda: mx(scale=npu(K // 32, N, dtype=torch.uint8)),
    "e2m1 weights packed along N": lambda: mx(x2=npu(K, N // 2, dtype=torch.uint8)),
    "an algorithm of scales that fp8 has not": lambda: NPU.npu_dynamic_mx_quant(
        x(), dst_type=torch.float8_e4m3fn, scale_alg=2
    ),
    "fp32 activations": lambda: NPU.npu_dynamic_quant(x(torch.float32), dst_type=torch.int8),
    "int4 codes out of range": lambda: NPU.npu_convert_weight_to_int4pack(npu(K, N, dtype=torch.int32) + 8),
    "int4 codes of int8": lambda: NPU.npu_convert_weight_to_int4pack(npu(K, N, dtype=torch.int8)),
    "scales of another dtype than the activations": lambda: int4(antiquant_scale=npu(K // 32, N)),
    "a group that the scales do not have": lambda: int4(antiquant_group_size=64),
    "an fp16 bias to bf16 activations": lambda: int4(bias=npu(N, dtype=torch.float16)),
    "weights in tiles outside of a graph": lambda: int4(
        weight=NPU.npu_format_cast(npu(K, N, dtype=torch.int8), 29),
        antiquant_scale=npu(N, dtype=torch.bfloat16),
        antiquant_group_size=0,
    ),
    "offsets of another dtype than the scales": lambda: int4(antiquant_offset=npu(K // 32, N)),
    "one offset for each channel where scales are in groups": lambda: int4(
        antiquant_offset=npu(N, dtype=torch.bfloat16)
    ),
    "fp8 weights in groups": lambda: fp8(
        antiquant_scale=npu(K // 32, N, dtype=torch.bfloat16), antiquant_group_size=32
    ),
    "fp8 weights with offsets": lambda: fp8(antiquant_offset=npu(N, dtype=torch.bfloat16)),
    "one scale for all of an fp8 weight": lambda: fp8(antiquant_scale=npu(1, dtype=torch.bfloat16)),
    "an fp32 bias to fp8 weights": lambda: fp8(bias=npu(N)),
    "a dual-scale weight that is not in tiles": lambda: dual(x2=npu(N, K // 2, dtype=torch.int8)),
    "outer scales along the inputs": lambda: dual(x2_level0_scale=npu(N, 1)),
    "a smoothing scale that is not implemented": lambda: NPU.npu_dynamic_dual_level_mx_quant(
        x(), smooth_scale=npu(K)
    ),
}


@pytest.mark.parametrize("call", [int8, mx, int4, fp8, dual])
def test_the_right_call_is_taken(call):
    assert call().shape == (M, N)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake):
    with pytest.raises((RuntimeError, NotImplementedError)):
        MISTAKES[mistake]()


def test_constants_are_torch_npus():
    import torch_npu

    assert (
        (vendor.E8M0, vendor.E2M1)
        == (torch_npu.float8_e8m0fnu, torch_npu.float4_e2m1fn_x2)
        == (register.E8M0, register.E2M1)
    )


def test_what_a_build_lacks_is_read_from_its_schema():
    assert vendor.lacking("npu_quant_matmul", ("group_sizes",)) == ""
    assert vendor.lacking("npu_imaginary") == "this torch_npu has no npu_imaginary"
    assert "does not take imaginary" in vendor.lacking("npu_quant_matmul", ("imaginary",))


def test_the_published_example_of_dual_scale():
    """op-plugin's own test: all 8.0 gives bytes 0x77, 1.3333 and the exponent of 1."""
    codes, level0, level1 = NPU.npu_dynamic_dual_level_mx_quant(
        torch.full((1, 512), 8.0, dtype=torch.bfloat16, device="npu")
    )
    assert set(codes.flatten().tolist()) == {0x77}
    assert level0.item() == pytest.approx(4 / 3)
    assert set(level1.flatten().tolist()) == {127}
