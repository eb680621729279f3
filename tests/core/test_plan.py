"""The plan: pattern rules, fallback policies, guards and the text of every decision, on fake and on real
rooms.
"""

from __future__ import annotations

import json

import pytest
import torch
from core_fakes import FakeKernel, Shape, arch, device
from core_references import check_parts

import quantport
from quantport.config import QuantConfig
from quantport.device import Device
from quantport.errors import ConfigError, UnsupportedError
from quantport.kernels.verdict import Reason, ReasonCode, Status
from quantport.model.layers import find_layers
from quantport.model.roles import SkipCode
from quantport.planning.plan import make_plan
from quantport.scheme.catalog import BUILTIN

NATIVE = FakeKernel("acme.native", quantizes=True)
DEQUANTIZE = FakeKernel("acme.dequantize", Status.DEQUANTIZE)
REFERENCE = FakeKernel("acme.reference", Status.REFERENCE, quantizes=True)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def linears(*names, shape=(64, 64), dtype=torch.bfloat16):
    return find_layers({f"{name}.weight": Shape(shape, dtype) for name in names})


def planned(layers, config="int8", kernels=(NATIVE, DEQUANTIZE), on=None, **options):
    return make_plan(layers, QuantConfig.parse(config, BUILTIN), on or device(), kernels, BUILTIN, **options)


def schemes(plan):
    return {s.layer.name: s.requested_scheme for s in plan.steps}


def test_bytes_and_steps():
    plan = planned(
        find_layers(
            {"a.weight": Shape((64, 64)), "norm.weight": Shape((64,)), "lm_head.weight": Shape((10, 64))}
        )
    )
    a, norm, head = plan.steps
    assert (a.requested_scheme, a.before, a.after, a.note) == ("int8", 8192, 4096 + 64 * 4, "")
    assert (norm.requested_scheme, norm.before, norm.after) == (None, 128, 128)
    assert (head.requested_scheme, head.before, head.after) == (None, 1280, 1280)
    assert "output head" in head.note
    assert (plan.before, plan.after) == (8192 + 128 + 1280, 4352 + 128 + 1280)
    assert plan.peak > plan.after
    assert plan.quantized == (a,)
    assert plan.by_layer["a"] is a


def test_patterns():
    layers = linears("m.0.q_proj", "m.0.mlp.up_proj", "m.1.q_proj", "lm_head")
    asked = planned(
        layers,
        {"scheme": "int8", "ignore": ["m.0.q_proj"], "targets": {"*.mlp.*": "fp8", "re:m.1": "int4_wo"}},
    )
    assert schemes(asked) == {
        "m.0.q_proj": None,
        "m.0.mlp.up_proj": "fp8_per_tensor",
        "m.1.q_proj": "int4_weight_only",
        "lm_head": None,
    }
    assert "m.0.q_proj" in asked.by_layer["m.0.q_proj"].note
    assert (
        schemes(planned(layers, {"scheme": "int8", "targets": {"lm_head": "int4_wo"}}))["lm_head"]
        == "int4_weight_only"
    )
    assert schemes(planned(layers, {"scheme": "int8", "targets": {"*": "fp8"}}))["lm_head"] is None, (
        "a glob is no order"
    )


DISAGREE = [
    {"ignore": ["*.q_proj"], "targets": {"m.*": "int8"}},
    {"targets": {"*.q_proj": "int8", "m.*": "int4"}},
]


@pytest.mark.parametrize("config", DISAGREE, ids=str.split("ignore targets"))
def test_patterns_that_conflict(config):
    with pytest.raises(ConfigError) as caught:
        planned(linears("m.q_proj"), config)
    check_parts(caught.value, "m.q_proj", "'*.q_proj'", "'m.*'")


def test_patterns_that_agree():
    assert schemes(planned(linears("m.q_proj"), {"targets": {"*.q_proj": "int8", "m.*": "w8a8"}})) == {
        "m.q_proj": "int8"
    }


@pytest.mark.parametrize("key", ["ignore", "targets"])
def test_unmatched_pattern(key):
    def config(**more):
        return {"scheme": "int8", key: ["q_poj"] if key == "ignore" else {"q_poj": "int8"}, **more}

    layers = linears("m.q_proj", "m.k_proj")
    with pytest.raises(ConfigError) as caught:
        planned(layers, config())
    check_parts(caught.value, "'q_poj'", "none of 2 layers", "m.q_proj", "on_unmatched")
    with pytest.warns(UserWarning, match="q_poj"):
        plan = planned(layers, config(on_unmatched="warn"))
    assert schemes(plan) == {"m.q_proj": "int8", "m.k_proj": "int8"}
    with pytest.raises(ConfigError, match=r"did you mean '\*q_proj\*'"):
        planned(layers, {"scheme": "int8", "ignore": ["q_proj"]})


def test_unmatched_pattern_of_a_component():
    with pytest.raises(ConfigError, match=r"'x\.nothing'"):
        planned(linears("x.a"), {"components": {"x": {"scheme": "int8", "ignore": ["x.nothing"]}}})


@pytest.mark.parametrize("fused", ["qkv_proj", "gate_up_proj"])
def test_fused_layers_take_the_names_of_their_shards(fused):
    shards = {"qkv_proj": "[qkv]_proj", "gate_up_proj": "*_proj"}[fused]
    layers = linears(f"m.{fused}")
    assert schemes(planned(layers, {"scheme": "int8", "ignore": [f"m.{shards}"]})) == {f"m.{fused}": None}
    assert schemes(planned(layers, {"scheme": "int8", "targets": {f"re:m.{fused}": "fp8"}})) == {
        f"m.{fused}": "fp8_per_tensor"
    }
    each = ["*" + part.rpartition(".")[2] for part in layers[0].shards]
    assert schemes(planned(layers, {"scheme": "int8", "ignore": each})) == {f"m.{fused}": None}


@pytest.mark.parametrize(
    ("fused", "config", "named"),
    [
        ("qkv_proj", {"ignore": ["m.q_proj"]}, ["m.q_proj -> ignored", "m.k_proj -> no pattern"]),
        (
            "qkv_proj",
            {"targets": {"m.q_proj": "int8", "m.[kv]_proj": "int4_wo"}},
            ["q_proj -> int8", "k_proj -> int4_weight_only"],
        ),
        (
            "gate_up_proj",
            {"ignore": ["*.gate_proj"], "targets": {"*.up_proj": "int8"}},
            ["gate_proj -> ignored", "up_proj -> int8"],
        ),
        ("qkv_proj", {"ignore": ["re:.*v_proj"]}, ["m.q_proj -> no pattern", "m.v_proj -> ignored"]),
        ("qkv_proj", {"targets": {"*v_proj": "int4_wo"}}, ["m.v_proj -> int4_weight_only"]),
        ("gate_up_proj", {"ignore": ["*up_proj"]}, ["m.gate_proj -> no pattern", "m.up_proj -> ignored"]),
        ("gate_up_proj", {"ignore": ["re:m.g"]}, ["m.gate_proj -> ignored", "m.up_proj -> no pattern"]),
        (
            "qkv_proj",
            {"ignore": ["m.qkv_proj"], "targets": {"m.q_proj": "int4_wo"}},
            ["m.q_proj -> int4_weight_only", "m.k_proj -> ignored"],
        ),
    ],
)
def test_shards_that_disagree(fused, config, named):
    with pytest.raises(ConfigError) as caught:
        planned(linears(f"m.{fused}"), {"scheme": "int8", **config})
    check_parts(caught.value, f"m.{fused}", *named)


def experts(n=4, inner=6, hidden=8):
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return find_layers({f"m.experts.{e}.{p}.weight": Shape(shapes[p]) for e in range(n) for p in PROJECTIONS})


def test_experts_follow_moe_and_patterns():
    assert schemes(planned(experts(), {"scheme": "int8", "moe": "int4_wo"})) == {
        "m.experts": "int4_weight_only"
    }
    assert planned(experts(), {"scheme": "int8", "moe": None}).steps[0].note == "left alone by moe=null"
    assert schemes(planned(experts(), {"scheme": "int8", "linear": None})) == {"m.experts": "int8"}
    for pattern in ("m.experts", "m.experts.*", "re:.*experts.[0-9]+.(gate|up|down)_proj"):
        assert schemes(planned(experts(), {"scheme": "int8", "ignore": [pattern]})) == {"m.experts": None}, (
            pattern
        )
    split = schemes(planned(experts(), {"scheme": "int8", "ignore": ["m.experts.0.*"]}))
    assert split == {"m.experts": "int8", "m.experts.0": None}


def test_expert_bytes():
    step = planned(experts(), "int8").steps[0]
    assert step.before == 2 * 4 * 3 * 48
    assert step.after == 4 * (3 * 48 + 4 * (6 + 6 + 8))


def test_layers_that_cannot_be_targets():
    layers = find_layers({"norm.weight": Shape((8,)), "m.gate.weight": Shape((8, 8))})
    for name in ("norm.weight", "m.gate"):
        with pytest.raises(ConfigError) as caught:
            planned(layers, {"targets": {name: "int8"}})
        check_parts(caught.value, name, "lm_head")


@pytest.mark.parametrize(
    ("fallback", "kernels", "expected"),
    [
        ("weight_only", (NATIVE, DEQUANTIZE, REFERENCE), ("native", "W8A8", "acme.native")),
        ("error", (NATIVE, DEQUANTIZE, REFERENCE), ("native", "W8A8", "acme.native")),
        ("weight_only", (DEQUANTIZE, REFERENCE), ("weight_only", "W8A16", "acme.dequantize")),
        ("reference", (DEQUANTIZE, REFERENCE), ("reference", "W8A8", "acme.reference")),
        ("weight_only", (REFERENCE,), ("reference", "W8A8", "acme.reference")),
        ("error", (DEQUANTIZE, REFERENCE), None),
        ("reference", (DEQUANTIZE,), None),
        ("weight_only", (), None),
    ],
)
def test_fallback_policies(fallback, kernels, expected):
    config = {"scheme": "int8", "fallback": fallback}
    if expected is None:
        with pytest.raises(UnsupportedError) as caught:
            planned(linears("a"), config, kernels)
        check_parts(caught.value, "int8 for a", f"fallback={fallback!r}", "acme", "weight_only")
        return
    choice = planned(linears("a"), config, kernels).steps[0].choice
    assert (str(choice.status), choice.precision, choice.kernel) == expected
    assert bool(choice.reasons) == (expected[0] != "native")
    assert choice.activations == ("16-bit" if expected[1] == "W8A16" else "int8 per token")


def test_fallback_of_a_component_is_not_dropped():
    """It holds for the whole model; inside a component it is refused, not ignored."""
    with pytest.raises(ConfigError, match="fallback inside a component"):
        planned(linears("a.x"), {"components": {"a": {"scheme": "int8", "fallback": "error"}}}, (DEQUANTIZE,))
    with pytest.raises(UnsupportedError):
        planned(linears("a.x"), {"components": {"a": "int8"}, "fallback": "error"}, (DEQUANTIZE,))


def test_the_fastest_of_equals_wins_and_slow_is_said():
    slow, fast = (
        FakeKernel("k.slow", quantizes=True, speed=0.5),
        FakeKernel("k.fast", quantizes=True, speed=2.0),
    )
    assert planned(linears("a"), "int8", (slow, fast)).steps[0].choice.kernel == "k.fast"
    step = planned(linears("a"), "int8", (slow,), num_tokens=16).steps[0]
    assert step.slow
    assert "0.50x BF16 at 16 rows" in step.note
    assert "no scheme is faster here" in step.note
    int4 = FakeKernel("k.int4", accepts=lambda r: r.weight.scheme.name == "int4_weight_only", speed=4.0)
    assert "faster here: int4_weight_only (4.0x)" in planned(linears("a"), "int8", (slow, int4)).steps[0].note
    slow_of_8_bits = FakeKernel(
        "k.8", accepts=lambda r: r.weight.scheme.name != "int4_weight_only", quantizes=True, speed=0.5
    )
    unknown = FakeKernel("k.unknown", accepts=lambda r: r.weight.scheme.name == "int4_weight_only")
    assert "nobody measured the speed of int4_weight_only here" in (
        planned(linears("a"), "int8", (slow_of_8_bits, unknown)).steps[0].note
    )
    known = FakeKernel("k.known", quantizes=True, slow="it copies")
    assert "slower than BF16: it copies" in planned(linears("a"), "int8", (known,)).steps[0].note


@pytest.mark.parametrize("status", [Status.NATIVE, Status.DEQUANTIZE])
def test_the_kernel_of_experts_takes_every_projection(status):
    """gate and up are 6 x 8, down is 8 x 6: a kernel that refuses one of them must not be bound to all."""
    wide = FakeKernel("k.wide", status, accepts=lambda r: r.weight.k == 8, quantizes=True)
    tall = FakeKernel("k.tall", status, accepts=lambda r: r.weight.k == 6, quantizes=True)
    both = FakeKernel("k.both", Status.REFERENCE, quantizes=True)
    for kernels in ((wide, tall, both), (tall, wide, both), (wide, both), (tall, both)):
        assert planned(experts(), "int8", kernels).steps[0].choice.kernel == "k.both"


def test_rejected_kernels_are_in_the_reasons():
    picky = FakeKernel("k.picky", accepts=lambda r: False, quantizes=True)
    reasons = planned(linears("a"), "int8", (picky, DEQUANTIZE)).steps[0].choice.reasons
    assert any("k.picky refuses 64 x 64" in r for r in reasons)


class NoUnit(FakeKernel):
    """Refuses, and says of what it is about."""

    def __init__(self, name, code):
        super().__init__(name, quantizes=True)
        self.code = code

    def reasons_against(self, request):
        return (Reason(f"no int8 matrix instruction, says {self.name}", code=self.code),)


def test_a_missing_instruction_is_said_once_and_told_by_its_code():
    """Whatever the texts say: it is the code that decides what the summary says already."""
    same, other = NoUnit("k.same", ReasonCode.NO_MATRIX_INSTRUCTION), NoUnit("k.other", ReasonCode.OTHER)
    without = Device(arch(native=("bf16",)), 0)
    summary, *rest = planned(linears("a"), "int8", (same, other, DEQUANTIZE), without).steps[0].choice.reasons
    assert "has no int8 matrix instruction" in summary
    assert rest == ["k.other: no int8 matrix instruction, says k.other"]
    # where the summary says something else, the kernel's own reason is news
    _, *rest = planned(linears("a"), "int8", (same, DEQUANTIZE)).steps[0].choice.reasons
    assert rest == ["k.same: no int8 matrix instruction, says k.same"]


def test_steps_carry_why_they_are_skipped():
    layers = linears("blocks.0.a", "blocks.1.a", "blocks.1.b", "lm_head")
    config = {"scheme": "int8", "ignore": ["*.b"], "num_bf16_fallback_layers": 1}
    steps = planned(layers, config).by_layer
    codes = {name: step.skip_reason and step.skip_reason.code for name, step in steps.items()}
    assert codes == {
        "blocks.0.a": SkipCode.FIRST_BLOCKS,
        "blocks.1.a": None,
        "blocks.1.b": SkipCode.PATTERN,
        "lm_head": SkipCode.ROLE,
    }
    assert all(step.note == str(step.skip_reason or "") for step in steps.values())


def test_json_is_stable_and_plain():
    layers, config = linears("a", "lm_head"), {"scheme": "int8", "linear": None, "targets": {"a": "int8"}}
    first, second = planned(layers, config, source="m"), planned(layers, config, source="m")
    assert first == second
    assert first.to_json() == second.to_json()
    data = json.loads(first.to_json())
    keys = [
        "source",
        "format",
        "device",
        "shard",
        "rows",
        "why",
        "config",
        "bytes_before",
        "bytes_after",
        "bytes_peak",
        "bytes_free",
        "fits",
        "kv_cache",
        "warnings",
        "layers",
    ]
    assert list(data) == keys
    assert data["device"] == "acme:0 (a1)"
    a, head = data["layers"]
    assert (a["name"], a["asked"], a["kernel"], a["status"], a["precision"]) == (
        "a",
        "int8",
        "acme.native",
        "native",
        "W8A8",
    )
    assert a["deviation"] == ""
    assert (a["evidence"], a["source"]) == ("declared", "acme.example/kernels")
    assert head["asked"] is None
    assert "output head" in head["note"]


def test_json_keeps_the_configuration():
    """An explicit null is a decision, not a default."""
    plan = planned(linears("a"), {"scheme": "int8", "linear": None, "fallback": "error"})
    again = QuantConfig.parse(json.loads(plan.to_json())["config"], BUILTIN)
    assert schemes(planned(linears("a"), again)) == schemes(plan) == {"a": None}
    assert again.fallback == "error"


def test_arguments_under_the_names_that_they_had_say_what_they_are_called_now():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
    with pytest.warns(DeprecationWarning, match="rows= is called num_tokens= now"):
        decided = quantport.plan(model, "int8", device="cpu", rows=16)
    assert decided.num_tokens == 16
    with pytest.warns(DeprecationWarning, match="model= is called path_or_id= now"):
        assert (
            quantport.plan(model=model, scheme="int8", device="cpu").by_layer
            == quantport.plan(model, "int8", device="cpu").by_layer
        )
    with pytest.warns(DeprecationWarning, match="num_tokens="):
        assert quantport.quantize_(model, "int8", rows=16).num_tokens == 16
    with pytest.raises(TypeError):
        quantport.plan(model, "int8", device="cpu", rows=16, num_tokens=16)
