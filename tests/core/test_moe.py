"""Mixture of experts: single experts with other schemes, routers left alone, routing that goes wrong, groups
of rows.
"""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from core_fakes import Shape
from core_models import MOE, Tiny, ids, made, same_bits, same_state, write
from core_references import check_parts, randn
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import quantport
from quantport import numerics
from quantport.cli.plans import plan_page
from quantport.errors import CheckpointError, ConfigError, RoutingError, WeightError
from quantport.kernels.base import Kernel, WeightSpec
from quantport.model.layers import PROJECTIONS, find_layers
from quantport.model.roles import Role
from quantport.modules import QuantExperts, handles, ops
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN

FIRST = "model.layers.0.mlp.experts"
MIXED = {
    "scheme": "int8",
    "targets": {
        f"{FIRST}.3": "fp8_weight_only",
        "*.layers.[013].mlp.experts.7.down_proj": None,
        "model.layers.2.mlp.experts.*.down_proj": "int4_g32",
    },
}


def stored():
    found = {}
    for file in sorted(MOE.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def mixed():
    return quantport.load(MOE, config=MIXED)


@pytest.fixture
def fused(tmp_path):
    original = AutoModelForCausalLM.from_pretrained(MOE, dtype=torch.bfloat16)
    return write(tmp_path / "fused", original.state_dict(), config__json=(MOE / "config.json").read_text())


def test_single_experts_and_projections_get_another_scheme(mixed):
    steps = mixed.quantport_plan.by_layer
    asked = {name: step.requested_scheme for name, step in steps.items() if ".experts" in name}
    assert asked == {
        FIRST: "int8",
        f"{FIRST}.3": "fp8_weight_only",
        f"{FIRST}.7.down_proj": None,
        "model.layers.1.mlp.experts": "int8",
        "model.layers.1.mlp.experts.7.down_proj": None,
        "model.layers.2.mlp.experts": "int8",
        "model.layers.2.mlp.experts.*.down_proj": "int4_weight_only_g32",
        "model.layers.3.mlp.experts": "int8",
        "model.layers.3.mlp.experts.7.down_proj": None,
    }
    whole = quantport.plan(MOE, "int8").by_layer[FIRST]
    assert (
        steps[FIRST].before + steps[f"{FIRST}.3"].before + steps[f"{FIRST}.7.down_proj"].before
        == whole.before
    )
    experts = mixed.model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts)
    assert experts.specs["3.up_proj"].scheme.name == "fp8_weight_only"
    tensors = stored()
    for e, projection, scheme in (
        (3, "gate_proj", "fp8_weight_only"),
        (7, "up_proj", "int8"),
        (7, "down_proj", "bf16"),
    ):
        expected = numerics.quantize_weight(tensors[f"{FIRST}.{e}.{projection}.weight"], BUILTIN[scheme])
        found = experts.stored_weight(f"{e}.{projection}")
        assert all(same_bits(found[key], tensor) for key, tensor in expected.items()), (e, projection)
    assert sum(b.nbytes for b in experts.buffers() if b.layout is torch.strided) > 0
    assert "fp8_weight_only" in repr(experts)
    assert experts.scheme == "int8 + fp8_weight_only + bf16"


def test_mixed_experts_compute_what_their_weights_say(mixed):
    experts = mixed.model.layers[0].mlp.experts
    x, index = (
        randn(9, 256, dtype=torch.bfloat16),
        torch.randint(0, 8, (9, 2), generator=torch.Generator().manual_seed(3)),
    )
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = torch.zeros(9, 256)
    for t in range(9):
        for j in range(2):
            gate, up, down = (f"{int(index[t, j])}.{p}" for p in PROJECTIONS)
            row = x[t : t + 1]
            g, u = (
                numerics.linear(row, experts.stored_weight(w), experts.specs[w].scheme) for w in (gate, up)
            )
            y = numerics.linear(
                nn.functional.silu(g) * u, experts.stored_weight(down), experts.specs[down].scheme
            )
            expected[t] += (y.float() * weights[t, j])[0]
    found = experts(x, index, weights).float()
    assert (found - expected).abs().max() / expected.abs().max() < 2.0**-6


def test_fused_checkpoints_and_memory_give_the_same(mixed, fused):
    same_state(quantport.load(fused, config=MIXED), mixed)
    original = AutoModelForCausalLM.from_pretrained(MOE, dtype=torch.bfloat16)
    quantport.quantize_(original, config=MIXED)
    same_state(original, mixed)


def test_mixed_experts_are_saved_copied_and_traced(mixed, tmp_path):
    folder = quantport.save(mixed, tmp_path / "out")
    record = json.loads((folder / "quantport.json").read_text())["layers"][FIRST]
    assert record["scheme"] == "int8"
    assert record["others"] == {**{f"3.{p}": "fp8_weight_only" for p in PROJECTIONS}, "7.down_proj": "bf16"}
    again = quantport.load(folder)
    same_state(again, mixed)
    assert torch.equal(again(ids).logits, mixed(ids).logits)
    assert {n: s.requested_scheme for n, s in again.quantport_plan.by_layer.items() if ".experts" in n} == {
        n: s.requested_scheme for n, s in mixed.quantport_plan.by_layer.items() if ".experts" in n
    }
    assert (quantport.save(again, tmp_path / "two") / "quantport.json").read_bytes() == (
        folder / "quantport.json"
    ).read_bytes()
    experts, given = mixed.model.layers[0].mlp.experts, routed()
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(other(*given), experts(*given))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(experts, fullgraph=True, backend="aot_eager")(*given), experts(*given))
    empty = copy.deepcopy(experts).to("meta").to_empty(device="cpu")
    empty.load_state_dict(experts.state_dict())
    assert torch.equal(empty(*given), experts(*given))


def test_compiled_experts_take_activations_that_lie_column_by_column(mixed):
    experts, (x, index, weights) = mixed.model.layers[0].mlp.experts, routed()
    x = x.t().contiguous().t()
    torch._dynamo.reset()
    traced = torch.compile(lambda *given: experts(*given) * 2, fullgraph=True, backend="aot_eager")
    seen = experts.operands()
    fake = torch.ops.quantport.experts_loop(x.to("meta"), index.to("meta"), weights.to("meta"), *_meta(seen))
    assert fake.stride() == experts(x, index, weights).stride() == (x.shape[1], 1)
    assert torch.equal(traced(x, index, weights), experts(x, index, weights) * 2)


def _meta(operands):
    tensors, sizes, handle = operands
    return [torch.empty(0, dtype=torch.uint8, device="meta") for _ in tensors], sizes, handle


def routed(rows=5, experts=8, top_k=2):
    index = torch.randint(0, experts, (rows, top_k), generator=torch.Generator().manual_seed(1))
    return randn(rows, 256, dtype=torch.bfloat16), index, torch.full((rows, top_k), 0.5, dtype=torch.bfloat16)


def test_one_expert_quantized_in_a_layer_that_stays(tmp_path):
    model = quantport.load(MOE, config={"linear": None, "moe": None, "targets": {f"{FIRST}.2": "int8"}})
    assert [s.layer.name for s in model.quantport_plan.quantized] == [f"{FIRST}.2"]
    full = AutoModelForCausalLM.from_pretrained(MOE, dtype=torch.bfloat16).model.layers[0].mlp.experts
    assert same_bits(
        model.model.layers[0].mlp.experts.stored_weight("5.down_proj")["weight"], full.down_proj[5]
    )
    same_state(quantport.load(quantport.save(model, tmp_path / "out")), model)


def test_experts_that_are_modules_take_the_same_patterns(tmp_path):
    folder = write(tmp_path / "c", made())
    config = {"scheme": "int8", "targets": {"moe.experts.1": "fp8", "moe.experts.2.down_proj": None}}
    model = quantport.load(folder, config=config, model=Tiny)
    assert {m.scheme for m in model.moe.experts[1].children()} == {"fp8_per_tensor"}
    assert model.moe.experts[2].up_proj.scheme == "int8"
    assert model.quantport_plan.by_layer["moe.experts.2.down_proj"].requested_scheme is None
    planned = quantport.plan(folder, config=config).by_layer
    assert (
        planned["moe.experts.1"].requested_scheme,
        planned["moe.experts.2.down_proj"].requested_scheme,
    ) == (
        "fp8_per_tensor",
        None,
    )


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ({f"{FIRST}.3": "int8", "*.experts.3": "fp8"}, [f"{FIRST}.3", "disagree"]),
        ({f"{FIRST}.8": "fp8"}, ["matches none"]),
        ({f"{FIRST}.3.mid_proj": "fp8"}, ["matches none"]),
    ],
)
def test_overrides_that_cannot_be(targets, named):
    with pytest.raises(ConfigError) as caught:
        quantport.plan(MOE, config={"scheme": "int8", "targets": targets})
    check_parts(caught.value, *named)


def test_the_innermost_pattern_wins():
    config = {
        "targets": {"*.experts": "int8", "*.experts.*": "fp8", "*.experts.3.down_proj": "int4_wo"},
        "scheme": "int8",
    }
    plan = quantport.plan(MOE, config=config).by_layer
    assert plan[f"{FIRST}.3.down_proj"].requested_scheme == "int4_weight_only"
    assert FIRST not in plan or plan[FIRST].requested_scheme == "int8"
    assert all(
        s.requested_scheme == "fp8_per_tensor"
        for n, s in plan.items()
        if n.startswith(f"{FIRST}.") and not n.endswith("down_proj")
    )


def test_experts_kept_beside_others_must_be_bf16(tmp_path):
    half = {name: t.half() for name, t in stored().items()}
    folder = write(tmp_path / "c", half, config__json=(MOE / "config.json").read_text())
    with pytest.raises(ConfigError) as caught:
        quantport.load(folder, config=MIXED)
    check_parts(caught.value, "down_proj", "float16")


@pytest.mark.parametrize(
    ("router", "expert"),
    [
        ("mlp.gate", "mlp.experts.{}.{}"),
        ("block_sparse_moe.gate", "block_sparse_moe.experts.{}.{}"),
        ("mlp.router", "mlp.experts.{}.{}"),
    ],
)
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_routers_and_shared_experts(router, expert, names):
    """Qwen, Mixtral and DeepSeek: routers stay, with their correction biases; shared experts are linear
    layers.
    """
    shapes = {f"m.{expert.format(e, p)}.weight": Shape((8, 8)) for e in range(4) for p in names}
    extra = {
        f"m.{router}.weight": Shape((4, 8)),
        f"m.{router}.e_score_correction_bias": Shape((4,)),
        "m.mlp.shared_experts.up_proj.weight": Shape((8, 8)),
        "m.mlp.shared_expert_gate.weight": Shape((1, 8)),
    }
    layers = {x.name: x for x in find_layers({**shapes, **extra})}
    assert layers[f"m.{router}"].role is Role.ROUTER
    assert layers["m.mlp.shared_expert_gate"].role is Role.ROUTER
    assert layers[f"m.{router}.e_score_correction_bias"].kind == "other"
    assert not layers["m.mlp.shared_experts.up_proj"].skip_reason
    assert sum(x.kind == "moe" for x in layers.values()) == 1


def test_router_weights_are_untouched(mixed):
    tensors = stored()
    for i, layer in enumerate(mixed.model.layers):
        assert same_bits(layer.mlp.gate.weight, tensors[f"model.layers.{i}.mlp.gate.weight"])
        assert layer.mlp.gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["int8", "fp8_weight_only", "int4_weight_only"])
def test_routing_at_the_edges(scheme):
    experts = quantport.load(MOE, scheme).model.layers[0].mlp.experts
    x, index, weights = routed(11)
    single = [experts(x[t : t + 1], index[t : t + 1], weights[t : t + 1]) for t in range(11)]
    close = {"rtol": 2.0**-5, "atol": 2.0**-5 * float(torch.cat(single).abs().max())}
    torch.testing.assert_close(experts(x, index, weights), torch.cat(single), **close)
    alone = torch.full_like(index, 5)
    torch.testing.assert_close(
        experts(x, alone, weights), experts(x, alone[:, :1], weights[:, :1] * 2), **close
    )
    many = torch.arange(16).expand(11, 16) % 8  # more slots than experts: each twice
    torch.testing.assert_close(
        experts(x, many, torch.full((11, 16), 0.25)),
        experts(x, many[:, :8], torch.full((11, 8), 0.5)),
        **close,
    )
    nowhere = torch.where(index == index[0, 0], -1, index)
    torch.testing.assert_close(
        experts(x, nowhere, weights), experts(x, nowhere.where(nowhere >= 0, 8), weights), rtol=0, atol=0
    )
    assert torch.equal(experts(x, torch.full_like(index, -1), weights), torch.zeros_like(x))
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 256)


def test_routing_that_is_wrong_is_told(mixed):
    experts, (x, index, weights) = mixed.model.layers[1].mlp.experts, routed()
    for bad, named in (
        ((x, index + 9, weights), "8 experts"),
        ((x, index[:3], weights), "[3, 2]"),
        ((x, index[:3], weights[:3]), "[3, 2]"),
        ((x, index.view(-1), weights.view(-1)), "[10]"),
    ):
        with pytest.raises(RoutingError) as caught:
            experts(*bad)
        check_parts(caught.value, named)


def changed(tmp_path, change):
    tensors = stored()
    change(tensors)
    return write(tmp_path / "c", tensors, config__json=(MOE / "config.json").read_text())


def test_an_expert_with_a_nan_is_named(tmp_path, fused):
    def poison(tensors):
        tensors[f"{FIRST}.5.up_proj.weight"][3, 4] = float("nan")

    with pytest.raises(WeightError) as caught:
        quantport.load(changed(tmp_path, poison), "int8")
    check_parts(caught.value, f"{FIRST}.5.up_proj")
    tensors = load_file(fused / "model.safetensors")
    tensors[f"{FIRST}.gate_up_proj"][5, -1, 0] = float("inf")
    write(fused, tensors)
    with pytest.raises(WeightError, match=r"experts\.5\.up_proj"):
        quantport.load(fused, "int8")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: [t.pop(f"{FIRST}.2.{p}.weight") for p in PROJECTIONS], f"{FIRST}.2."),
        (lambda t: t.pop(f"{FIRST}.2.down_proj.weight"), f"{FIRST}.2.down_proj is absent"),
        (
            lambda t: t.update({f"{FIRST}.4.up_proj.weight": torch.zeros(8, 256).bfloat16()}),
            f"{FIRST}.4.up_proj is [8, 256]",
        ),
        (lambda t: [t.pop(f"{FIRST}.{e}.up_proj.weight") for e in range(8)], f"{FIRST} has only"),
    ],
    ids=["expert", "projection", "shape", "every up"],
)
def test_experts_that_are_absent_or_uneven(tmp_path, change, named):
    with pytest.raises(CheckpointError) as caught:
        quantport.load(changed(tmp_path, change), "int8")
    check_parts(caught.value, named)


@pytest.mark.parametrize(
    "shapes",
    [
        {"m.experts.gate_up_proj": (0, 12, 8), "m.experts.down_proj": (0, 8, 6)},
        {"m.experts.gate_up_proj": (4, 0, 8), "m.experts.down_proj": (4, 8, 0)},
        {
            f"m.experts.{e}.{p}.weight": (8, 0) if p == "down_proj" else (0, 8)
            for e in range(2)
            for p in PROJECTIONS
        },
    ],
    ids=["no experts", "no intermediate", "no intermediate, one by one"],
)
def test_no_experts_and_empty_experts(shapes):
    layers = find_layers({name: Shape(shape) for name, shape in shapes.items()})
    assert layers
    assert all(layer.skip_reason for layer in layers)
    assert sum(layer.bytes for layer in layers) == 0


class Look(Kernel):
    """Records the rows that it is given."""

    name = "look"

    def __init__(self):
        self.rows = []

    def reasons_against(self, request):
        return ()

    def claim(self, request):
        raise NotImplementedError

    def run(self, x, packed, bias, spec):
        self.rows.append(x.shape[0])
        y = x.float() @ packed[0].float().t()
        return (y if bias is None else y + bias).to(x.dtype)


def test_grouped_linear_multiplies_routed_rows_only():
    spec, look = WeightSpec(BUILTIN["bf16"], 6, 16), Look()
    weights, bias, x = [(randn(6, 16, seed=i),) for i in range(8)], randn(4, 12), randn(10, 16)
    offsets = torch.tensor([0, 3, 3, 4, 8])
    y = ops.run_grouped(look, x, offsets, weights, bias, spec, shared=2)
    assert look.rows == [3, 3, 1, 1, 4, 4]
    for g, (a, b) in enumerate(((0, 3), (3, 3), (3, 4), (4, 8))):
        expected = torch.cat([x[a:b] @ weights[2 * g + j][0].t() for j in range(2)], 1) + bias[g]
        torch.testing.assert_close(y[a:b], expected)
    assert torch.equal(y[8:], torch.zeros(2, 12))


@pytest.mark.parametrize("offsets", [[1, 2, 3], [0, 3, 2], [0, 2, 11], [], [0, -1, 3]], ids=str)
def test_groups_that_cannot_be(offsets):
    spec = WeightSpec(BUILTIN["bf16"], 6, 16)
    with pytest.raises(RoutingError) as caught:
        ops.run_grouped(Look(), randn(10, 16), torch.tensor(offsets, dtype=torch.int64), [()] * 2, None, spec)
    check_parts(caught.value)
    with pytest.raises(RoutingError, match="3 weights"):
        ops.run_grouped(Look(), randn(10, 16), torch.tensor([0, 1, 2]), [()] * 3, None, spec)


@pytest.mark.parametrize("shared", [1, 2])
def test_grouped_linear_is_an_operator(shared):
    scheme = BUILTIN["int8"]
    name = quantport.plan(MOE, "int8").by_layer[FIRST].choice.kernel
    kernel, spec = default_registry().kernel(name), WeightSpec(scheme, 32, 64)
    weights = [numerics.quantize_weight(randn(32, 64, seed=i).bfloat16(), scheme) for i in range(3 * shared)]
    packed = [t for w in weights for t in kernel.pack(w, spec)]
    x, offsets = randn(7, 64, dtype=torch.bfloat16), torch.tensor([0, 2, 2, 6])
    op = torch.ops.quantport.grouped_linear
    handle = handles.bind(kernel, spec, default_registry()).handle
    args = (x, offsets, packed, randn(3, shared * 32).bfloat16(), handle, shared)
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}
    y = op(*args)
    for e, (a, b) in enumerate(((0, 2), (2, 2), (2, 6))):
        for j in range(shared):
            part = args[3][e, 32 * j : 32 * (j + 1)]
            expected = numerics.linear(x[a:b], weights[shared * e + j], scheme, part).float()
            if a < b:
                assert (
                    y[a:b, 32 * j : 32 * (j + 1)] - expected
                ).abs().max() <= 2 * kernel.tolerance * expected.abs().max()
    torch._dynamo.reset()
    assert torch.equal(
        torch.compile(lambda x, o: op(x, o, *args[2:]), fullgraph=True, backend="aot_eager")(x, offsets), y
    )


def test_the_page_of_a_plan_shows_the_pieces():
    targets = {"*.experts.[35]": "fp8_weight_only", "*.experts.7.down_proj": None}
    page = plan_page(quantport.plan(MOE, config={"scheme": "int8", "targets": targets}))
    groups = {g["layers"]: (g["count"], g["asked"]) for g in page.data["groups"] if ".experts" in g["layers"]}
    assert groups == {
        "model.layers.*.mlp.experts": (4, "int8"),
        "model.layers.{0-3}.mlp.experts.{3,5}": (8, "fp8_weight_only"),
        "model.layers.*.mlp.experts.7.down_proj": (4, None),
    }
    assert any("experts.7.down_proj" in text for text in page.data["kept"])
