"""The stored tensors against compressed-tensors, which Transformers and vLLM load: names, shapes and bytes.

Named differences, each with a test: compressed-tensors computes scales, and quotients, in the dtype of the
weight; here both are fp32. It stores scales in that dtype; here those of int4 are bf16 and those of fp8 and
int8 fp32. Per tensor it stores [1], here [1, 1]. Quotients of -0 become +0 in e2m1, and a scale near 2**128
becomes 1: here the sign is kept, and scales saturate. The global scale of nvfp4 is rounded twice there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_peers import normal, patterns, peer, raw
from torch import Tensor

from quantport import numerics
from quantport.scheme.catalog import BUILTIN


def mx(bits: int, form: str) -> dict[str, Any]:
    return {
        "form": form,
        "num_bits": bits,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
        "zp_dtype": torch.uint8,
    }


def int4(size: int) -> dict[str, Any]:
    return {"form": "pack-quantized", "num_bits": 4, "type": "int", "strategy": "group", "group_size": size}


CASES: dict[str, dict[str, Any]] = {
    "fp8_per_tensor": {"form": "float-quantized", "num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8_per_channel": {"form": "float-quantized", "num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8_per_block": {
        "form": "float-quantized",
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [128, 128],
    },
    "int8": {"form": "int-quantized", "num_bits": 8, "type": "int", "strategy": "channel"},
    "int4_weight_only": int4(128),
    "int4_weight_only_g32": int4(32),
    "mxfp8": mx(8, "mxfp8-quantized"),
    "mxfp6_e2m3": mx(6, "mxfp6-pack-quantized"),
    "mxfp4": mx(4, "mxfp4-pack-quantized"),
    "nvfp4": {
        "form": "nvfp4-pack-quantized",
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
    },
}


def extremes(w: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """What an observer of compressed-tensors sees: smallest and largest value of each block."""
    n, k = w.shape
    if args.strategy == "tensor":
        return torch.aminmax(w)
    if args.strategy == "block":
        rows, cols = args.block_structure
        w = torch.nn.functional.pad(w, (0, -k % cols, 0, -n % rows)).view(
            -(-n // rows), rows, -(-k // cols), cols
        )
        return w.amin((1, 3)), w.amax((1, 3))
    w = w.view(n, -1, args.group_size or k)
    return w.amin(2), w.amax(2)


def compressed(w: Tensor, name: str) -> dict[str, Tensor]:
    """The tensors that compressed-tensors stores of a weight."""
    quantization, utils = (
        peer("compressed_tensors.quantization"),
        peer("compressed_tensors.quantization.utils"),
    )
    compressors = peer("compressed_tensors.compressors.base").BaseCompressor
    case = dict(CASES[name])
    form = case.pop("form")
    args = quantization.QuantizationArgs(**case)
    state, factor = {"weight": w}, None
    if name == "nvfp4":
        factor = utils.generate_gparam(*torch.aminmax(w))
        if w.dtype is torch.float32:  # the named difference: one rounding
            factor = numerics.global_factor(w.abs().amax().view(1), BUILTIN[name].weight.element)
        state["weight_global_scale"] = factor
    scale = utils.calculate_qparams(*extremes(w, args), args, factor)[0]
    state["weight_scale"] = scale.to(torch.bfloat16).to(w.dtype) if name.startswith("int4") else scale
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    out: dict[str, Tensor] = compressors.get_value_from_registry(form).compress(state, scheme)
    if out.pop("weight_shape", None) is not None:  # int4: quantport stores bf16 scales, and knows the shape
        out["weight_scale"] = out["weight_scale"].to(torch.bfloat16)
    return out


def check(w: Tensor, name: str, negative_zeros: bool = False) -> None:
    """Names, dtypes, shapes and every byte of the stored tensors are equal.

    Args:
        w: fp32 weight.
        name: Scheme.
        negative_zeros: Whether some quotients are -0, which compressed-tensors makes +0 in e2m1: named,
            and nothing else.
    """
    found, expected = numerics.quantize_weight(w, BUILTIN[name]), compressed(w, name)
    if name == "fp8_per_tensor":
        expected["weight_scale"] = expected["weight_scale"].view(1, 1)
    described = [{key: (tuple(t.shape), t.dtype) for key, t in side.items()} for side in (found, expected)]
    assert described[0] == described[1]
    if negative_zeros and BUILTIN[name].weight.format == "e2m1":
        codes, theirs = (
            numerics.unpack_bits(side.pop("weight_packed"), w.shape[1], 4) for side in (found, expected)
        )
        wrong = codes != theirs
        assert wrong.any()
        assert (codes[wrong] == 8).all()
        assert (theirs[wrong] == 0).all()
        own = numerics.quantize_weight(w, BUILTIN[name])
        assert (numerics.dequantize_weight(own, BUILTIN[name], w.shape[1])[wrong] == 0).all()
    for key in found:
        wrong = raw(found[key]) != raw(expected[key])
        assert not wrong.any(), f"{key}: {wrong.sum()} of {wrong.numel()} bytes"


@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bytes_of_a_million_weights(name, spread):
    check(normal(768, 512, spread=spread), name)


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_a_million_bit_patterns(name):
    """Every magnitude but NaN and Inf, which compressed-tensors does not refuse; blocks of zeros, and of one
    element.
    """
    w = patterns(1 << 20).nan_to_num(0, 0, 0).view(1024, 1024)
    w[:128] = 0
    w[128:256, 1:] = 0
    w[0, :] = -0.0
    w[w.abs() > 2.9e38] = 1
    check(w, name, negative_zeros=True)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6_e2m3", "mxfp4"])
def test_named_difference_at_the_end_of_fp32(name):
    """An amax that rounds up to 2**128: compressed-tensors overflows to a scale of 1; here the exponent is
    127 - emax.
    """
    w = torch.full((1, 32), 3.3e38)
    theirs, own = compressed(w, name), numerics.quantize_weight(w, BUILTIN[name])
    assert theirs["weight_scale"].item() == 127
    assert own["weight_scale"].item() == 127 + 127 - {"mxfp8": 8}.get(name, 2)


def test_named_difference_of_the_global_scale():
    """``2688 / amax`` of a number and a tensor is rounded twice by torch: the last bit of some is off."""
    tops = torch.linspace(1, 2, 4001)
    theirs = torch.cat([peer("compressed_tensors.quantization.utils").generate_gparam(-t, t) for t in tops])
    own = numerics.global_factor(tops, BUILTIN["nvfp4"].weight.element)
    assert torch.equal(own, (2688 / tops.double()).float())
    steps = (own.view(torch.int32) - theirs.view(torch.int32)).abs()
    assert steps.max() == 1
    assert 0.1 < (steps > 0).float().mean() < 0.5


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_ties_and_edges(name):
    """All codes and their midpoints, with an amax that is exactly, just below and just above each rule's
    threshold.
    """
    quant = BUILTIN[name].weight
    step = torch.arange(-17, 18) / 16 * quant.element.half_range
    w = torch.zeros(256, 1024)
    w[:, : len(step)] = step
    w[:, 128 : 128 + len(step)] = step * 2.0 ** torch.arange(-128, 128)[:, None].clamp(-100, 100)
    w[:, 256:] = (torch.arange(768) % 32 == 0) * (1 + torch.arange(256)[:, None] / 256).expand(256, 768)
    check(w, name, negative_zeros=name == "nvfp4")


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6_e2m3", "mxfp4"])
def test_power_of_two_scales_are_equal_on_bf16_too(name):
    check(normal(768, 512).bfloat16(), name)


def test_named_difference_of_zero_groups_on_bf16():
    """The scale of a block of zeros is the epsilon of the scale's dtype: 2**-7 for compressed-tensors' bf16
    scales, here 2**-23.
    """
    w = torch.zeros(1, 128, dtype=torch.bfloat16)
    assert compressed(w, "int4_weight_only")["weight_scale"].item() == 2.0**-7
    assert numerics.quantize_weight(w, BUILTIN["int4_weight_only"])["weight_scale"].item() == 2.0**-23
    assert compressed(w.float(), "int4_weight_only")["weight_scale"].item() == 2.0**-23


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("fp8_per_tensor", 0.05),
        ("fp8_per_channel", 0.06),
        ("fp8_per_block", 0.05),
        ("int8", 0.15),
        ("int4_weight_only", 0.03),
        ("int4_weight_only_g32", 0.04),
        ("nvfp4", 0.03),
    ],
)
def test_named_difference_on_bf16(name, most):
    """compressed-tensors rounds scale and quotient of a bf16 weight to bf16 before it rounds to codes: a
    second rounding.

    Some codes differ, by a step; its squared error is up to a seventh above ours (int8), and never 2 percent
    below.
    """
    w = normal(768, 512).bfloat16()
    found, theirs = numerics.quantize_weight(w, BUILTIN[name]), compressed(w, name)
    key = "weight_packed" if "weight_packed" in found else "weight"
    share = (raw(found[key]) != raw(theirs[key])).float().mean().item()
    assert most / 4 < share < most
    theirs = {k: t.to(found[k].dtype).view_as(found[k]) for k, t in theirs.items()}
    errors = [
        (numerics.dequantize_weight(s, BUILTIN[name], 512) - w.float()).square().sum()
        for s in (found, theirs)
    ]
    assert 0.8 < errors[0] / errors[1] < 1.02
    check(w.float(), name)


@pytest.mark.parametrize(("name", "kind"), [("int8", "int"), ("fp8_per_channel", "float")])
def test_activations_per_token(name, kind):
    """Dynamic activation scales and codes, fp32."""
    quantization, utils = (
        peer("compressed_tensors.quantization"),
        peer("compressed_tensors.quantization.utils"),
    )
    forward = peer("compressed_tensors.quantization.lifecycle.forward")
    x, spec = (
        normal(1024, 1024),
        quantization.QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True),
    )
    scale, zero = utils.compute_dynamic_scales_and_zp(x[None], spec, torch.nn.Module())
    codes, own = numerics.quantize(x, BUILTIN[name].activation)
    assert torch.equal(own, scale.view_as(own))
    assert torch.equal(codes.float(), forward.quantize(x[None], scale, zero, spec)[0].float())
