"""Options of schemes that describe stored numbers: blocks, formats of scales, offsets."""

from __future__ import annotations

import pytest
import torch
from core_models import same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantport import numerics
from quantport.errors import ConfigError
from quantport.kernels.base import Request, WeightSpec
from quantport.kernels.verdict import Status
from quantport.modules import QuantLinear
from quantport.numerics.sharding import quantize_shard
from quantport.planning.select_kernel import Choice, select_kernel
from quantport.plugins.registry import default_registry
from quantport.scheme import Quant, Scheme
from quantport.scheme.catalog import BUILTIN

NAMED = {
    "int4_weight_only:g64": Quant("int4", (1, 64), "bf16"),
    "int4_weight_only:channel:fp16": Quant("int4", (1, 0), "fp16"),
    "int4_weight_only:g32:fp32:asym": Quant("int4", (1, 32), "fp32", zero_point=True),
    "int8_weight_only:g128:fp16": Quant("int8", (1, 128), "fp16"),
    "fp8_per_channel:bf16": Quant("e4m3fn", (1, 0), "bf16"),
    "int8:tensor": Quant("int8", (0, 0)),
    "nf4:g128": Quant("nf4", (1, 128)),
    "int4_weight_only:g64:actorder": Quant("int4", (1, 64), "bf16"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_says_what_is_stored(name):
    scheme = BUILTIN[name]
    assert (scheme.name, scheme.weight) == (name, NAMED[name])
    assert scheme.activation == BUILTIN[name.split(":")[0]].activation


@pytest.mark.parametrize(
    "name",
    [
        "mxfp4:g64",
        "q4_0:fp32",
        "nf4:asym",
        "nf4:tensor",
        "bf16:g32",
        "int8:g0",
        "int8:g99999",
        "int8:g",
        "nvfp4:fp16",
        "mxfp4:actorder",
        "q4_0:actorder",
        "int8:actorder:actorder",
    ],
)
def test_other_numbers_have_no_such_options(name):
    with pytest.raises(ConfigError, match="no such option"):
        BUILTIN[name]


def test_by_hand():
    """One group from -3 to 12: 15 steps of 1 from code -8, which stands for -3, so that 0 is code -5."""
    w = torch.tensor([[-3.0, 0.0, 12.0, 4.4, 0.6, -0.4, 5.5, 6.5]])
    stored = numerics.quantize_weight(w, BUILTIN["int4_weight_only:channel:fp32:asym"])
    assert stored["weight_scale"].tolist() == [[1.0]]
    assert stored["weight_zero"].tolist() == [[5.0]]
    values = numerics.dequantize_weight(stored, BUILTIN["int4_weight_only:channel:fp32:asym"], 8)
    assert values.tolist() == [[-3.0, 0.0, 12.0, 4.0, 1.0, 0.0, 6.0, 6.0]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_group_of_one_sign_has_a_zero_too(sign):
    scheme = BUILTIN["int4_weight_only:channel:fp32:asym"]
    w = sign * torch.arange(8, 23).float()[None]  # 8 to 22: a grid of 15 steps from 0 has steps of 22 / 15
    stored = numerics.quantize_weight(w, scheme)
    assert stored["weight_scale"].item() == torch.tensor(22 / 15).item()
    assert torch.equal(stored["weight_zero"], (8 if sign > 0 else -7) * stored["weight_scale"])


@given(st.integers(0, 1000), st.sampled_from([2.0**-12, 1.0, 300.0]), st.sampled_from(["int4", "int8"]))
def test_zero_is_a_code_and_offsets_are_zero_points_times_scales(seed, size, bits):
    w = torch.randn(3, 96, generator=torch.Generator().manual_seed(seed)) * size
    w[:, ::7] = 0
    scheme = BUILTIN[f"{bits}_weight_only:g32:fp32:asym"]
    stored = numerics.quantize_weight(w, scheme)
    values = numerics.dequantize_weight(stored, scheme, 96)
    assert not values[:, ::7].any()
    scale, zero = stored["weight_scale"].double(), stored["weight_zero"].double()
    points = (zero / scale).round()
    assert same_bits((points * scale).float(), stored["weight_zero"])
    wide = w.view(3, 3, 32)
    steps = (wide.amax(-1).clamp(min=0) - wide.amin(-1).clamp(max=0)) / (15 if bits == "int4" else 255)
    assert ((values - w).abs().view(3, 3, 32).amax(-1) <= steps * 1.01).all()


ORDERED = ("int4_weight_only:g32:fp32:asym:actorder", "int8:g32:actorder", "nf4:g32:hadamard:actorder")


def ordered(name: str, n: int = 24, k: int = 96) -> tuple[Scheme, dict[str, Tensor]]:
    """A weight whose columns are stored in some order."""
    scheme = BUILTIN[name]
    stored = numerics.quantize_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(3)), scheme)
    assert torch.equal(stored["weight_order"], torch.arange(k, dtype=torch.int32))
    return scheme, stored | {"weight_order": torch.randperm(k).to(torch.int32)}


@pytest.mark.parametrize("name", ORDERED)
def test_columns_are_stored_in_an_order(name):
    scheme, stored = ordered(name)
    plain = {key: tensor for key, tensor in stored.items() if key != "weight_order"}
    in_order = numerics.dequantize_weight(plain, scheme.in_order, 96)
    values = numerics.dequantize_weight(stored, scheme, 96)
    for column, place in enumerate(stored["weight_order"].tolist()):
        assert same_bits(values[:, place], in_order[:, column])
    assert scheme.in_order == BUILTIN[name.removesuffix(":actorder")]
    assert scheme.bytes(24, 96) == scheme.in_order.bytes(24, 96) + 4 * 96


@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("name", ORDERED)
def test_a_module_orders_its_inputs(name, rows):
    scheme, stored = ordered(name)
    spec = WeightSpec(scheme, 24, 96)
    chosen = choice(scheme)
    assert chosen.kernel == choice(scheme.in_order).kernel
    layer = QuantLinear(default_registry().kernel(chosen.kernel), spec)
    layer.set_weight("", stored)
    x = torch.randn(rows, 96).bfloat16()
    want = numerics.linear(x, stored, scheme)
    assert ((layer(x) - want).abs().max() <= 2.0**-6 * want.abs().max()).item()
    if not scheme.rotation:  # which comes after the order, and before `run`
        assert torch.equal(layer.kernel_of("").run(x, layer.packed(), None, spec), layer(x))
    for copy in (copied(layer), layer.to(torch.float32).to(torch.bfloat16)):
        assert all(same_bits(tensor, stored[key]) for key, tensor in copy.stored_weight().items())
        assert torch.equal(copy(x), layer(x))


def choice(scheme: Scheme, layer: str = "linear") -> Choice:
    """What a weight of a scheme gets here."""
    request = Request(WeightSpec(scheme, 24, 96), layer, default_registry().device("cpu"))
    return select_kernel(request, default_registry().kernels("cpu"))


def copied(layer: QuantLinear) -> QuantLinear:
    made = QuantLinear(layer.kernel, layer.spec)
    made.load_state_dict(layer.state_dict())
    return made


def test_a_module_orders_its_inputs_in_a_graph():
    scheme, stored = ordered(ORDERED[0])
    kernel = default_registry().kernel("torch.dequantize")
    layer, x = QuantLinear(kernel, WeightSpec(scheme, 24, 96)), torch.randn(3, 96).bfloat16()
    layer.set_weight("", stored)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    x.requires_grad_()
    layer(x).sum().backward()
    values = numerics.dequantize_weight(stored, scheme, 96, torch.bfloat16)
    assert torch.equal(x.grad, torch.ones(3, 24, dtype=torch.bfloat16) @ values)


def test_experts_have_no_order():
    assert choice(BUILTIN[ORDERED[0]], "moe").status is Status.UNSUPPORTED


def test_no_shard_of_the_inputs_has_the_order_of_all():
    with pytest.raises(ConfigError, match="order of the whole weight"):
        quantize_shard(torch.randn(8, 64), BUILTIN[ORDERED[0]], 1, reduce=lambda amax: amax)
