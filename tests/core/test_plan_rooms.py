"""The plan on the real rooms, on every architecture, and for a model of 671B parameters; the choice of a
scheme.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest
import torch
from core_fakes import FakeKernel, Shape, device
from core_references import check_parts

import quantport
from quantport.config import QuantConfig
from quantport.errors import CheckpointError, UnsupportedError
from quantport.kernels.verdict import Status
from quantport.model.layers import find_layers
from quantport.planning.decode_step import head_share
from quantport.planning.plan import best_scheme, make_plan
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN

DEQUANTIZE = FakeKernel("acme.dequantize", Status.DEQUANTIZE)


def linears(*names, shape=(64, 64)):
    return find_layers({f"{name}.weight": Shape(shape) for name in names})


def planned(layers, config="int8", kernels=(DEQUANTIZE,), on=None, **options):
    return make_plan(layers, QuantConfig.parse(config, BUILTIN), on or device(), kernels, BUILTIN, **options)


def only(scheme, **about):
    """A kernel of one scheme."""
    quantizes = BUILTIN[scheme].activation is not None
    return FakeKernel(
        f"k.{scheme}", accepts=lambda r: r.weight.scheme.name == scheme, quantizes=quantizes, **about
    )


@pytest.mark.parametrize(
    ("kernels", "expected", "words"),
    [
        (
            (only("fp8_per_channel", speed=1.7), only("int8", speed=2.5)),
            "int8",
            ("W8A8 by k.int8", "speed: 2.50x BF16 at 1 row [declared]", "fastest of 2 near-lossless"),
        ),
        (
            (only("fp8_per_channel"), only("int8_weight_only", speed=1.2)),
            "int8_weight_only",
            ("speed: 1.20x BF16", "fastest of 1 "),
        ),
        (
            (only("int8"), only("int8_weight_only")),
            "int8",
            (
                "speed: unknown",
                "fewest bytes of the near-lossless schemes that are native",
                "nobody measured",
            ),
        ),
        (
            (only("int8", speed=0.4), only("fp8_weight_only")),
            "fp8_weight_only",
            ("speed: unknown", "those measured are slower than BF16"),
        ),
        ((only("int8", speed=0.4),), "int8_weight_only", ("speed: unknown", "that are dequantize here")),
    ],
    ids=["fastest", "measured-before-unknown", "none-measured", "unknown-before-slower", "not-native"],
)
def test_the_device_chooses_by_speed_bytes_and_quality(kernels, expected, words):
    name, why = best_scheme(device(), (*kernels, DEQUANTIZE), BUILTIN)
    assert name == expected
    for word in (f"{name}: ", "memory: 50% of 16 bits", "quality: near-lossless (KL", *words):
        assert word in why
    assert "not faster" not in why


def test_a_plan_without_a_scheme_says_why():
    int8 = only("int8", speed=2.5)
    plan = planned(linears("a"), None, (int8, DEQUANTIZE))
    assert ({s.layer.name: s.requested_scheme for s in plan.steps}, plan.why.startswith("int8:")) == (
        {"a": "int8"},
        True,
    )
    assert planned(linears("a"), "int8").why == ""


@pytest.mark.parametrize("arch", ["cuda:sm_80", "cuda:sm_90"])
@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_channel"])
def test_real_rooms(arch, scheme):
    """fp8 on Ampere keeps its weights and says why; on Hopper activations are quantized per token."""
    target = default_registry().device(arch)
    kernels = default_registry().kernels("cuda")
    step = planned(linears("a", shape=(4096, 4096)), scheme, kernels, target).steps[0]
    if arch == "cuda:sm_80":
        assert (step.choice.status, step.choice.precision) == (Status.WEIGHT_ONLY, "W8A16")
        assert any("sm_80" in r and "no e4m3fn matrix instruction" in r for r in step.choice.reasons)
        with pytest.raises(UnsupportedError) as caught:
            planned(linears("a"), {"scheme": scheme, "fallback": "error"}, kernels, target)
        check_parts(caught.value, scheme, "cuda:sm_80", "no e4m3fn")
    else:
        assert (step.choice.status, step.choice.precision) == (Status.NATIVE, "W8A8")
        assert step.choice.activations == "e4m3fn per token"
        assert step.choice.reasons == ()
    emulated = (
        planned(linears("a"), {"scheme": scheme, "fallback": "reference"}, kernels, target).steps[0].choice
    )
    assert emulated.precision == "W8A8"


@pytest.mark.parametrize("kind", ["cpu", "cuda", "rocm", "xpu", "npu"])
def test_every_scheme_plans_on_every_architecture(kind):
    """No kernel raises, and the default policy finds a way, explained unless it is native, but for dtypes
    that it only stores.
    """
    for name in default_registry().backends[kind].archs:
        target = default_registry().device(f"{kind}:{name}")
        for scheme in BUILTIN:
            if BUILTIN[scheme].weight.element.storage in target.arch.storage_only_dtypes:
                with pytest.raises(UnsupportedError, match="only stores"):
                    planned(linears("a", shape=(256, 256)), scheme, default_registry().kernels(kind), target)
                continue
            choice = (
                planned(linears("a", shape=(256, 256)), scheme, default_registry().kernels(kind), target)
                .steps[0]
                .choice
            )
            assert not any(
                "the kernel raised" in r.text for v in choice.verdicts for r in getattr(v, "reasons", ())
            ), choice
            assert choice.claim is not None
            assert choice.reasons or choice.status is Status.NATIVE


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        ({"lm_head.weight": (100, 64)}, "int8", ("lm_head", 100 * 64 * 2, False)),
        (
            {"lm_head.weight": (100, 64)},
            {"scheme": "int8", "targets": {"lm_head": "int8"}},
            ("lm_head", 100 * 64 + 4 * 100, False),
        ),
        (
            {
                "lm_head.weight": (100, 64),
                "m.experts.gate_up_proj": (2, 64, 64),
                "m.experts.down_proj": (2, 64, 32),
            },
            "int8",
            ("lm_head", 100 * 64 * 2, True),
        ),
    ],
    ids=["kept", "quantized", "experts"],
)
def test_the_share_of_the_output_head(tensors, config, expected):
    """An embedding is looked up: it counts for nothing."""
    shapes = {"a.weight": (64, 64), "model.embed_tokens.weight": (100, 64), **tensors}
    plan = planned(find_layers({name: Shape(shape) for name, shape in shapes.items()}), config)
    found = head_share(plan)
    assert (found.layer, found.bytes, found.at_least) == expected
    others = sum(
        step.after for name, step in plan.by_layer.items() if name not in ("lm_head", "model.embed_tokens")
    )
    assert found.step_bytes == others + found.bytes
    assert f"{found.share:.0%} of the bytes" in str(found)
    assert ("at least" in str(found)) == found.at_least


@pytest.mark.parametrize(
    ("shape", "budget", "prepacked"),
    [
        ((1000, 4096), None, True),
        ((1000, 4096), "4MB", False),
        ((50_000, 4096), None, True),
        ((128_256, 16_384), None, False),
        ((256_000, 8192), None, False),
    ],
)
def test_a_layer_that_stays_is_prepacked_where_that_fits_the_budget(shape, budget, prepacked):
    """It is packed as a whole, beside what is read."""

    class Whole(FakeKernel):
        def packed_layout(self, spec):
            return None

    kernels = (DEQUANTIZE, Whole("k.bf16", accepts=lambda r: r.weight.scheme.name == "bf16", speed=2.0))
    plan = planned(linears("lm_head", shape=shape), kernels=kernels, budget=budget)
    choice = plan.by_layer["lm_head"].choice
    assert (choice.kernel if choice else "") == ("k.bf16" if prepacked else "")
    assert plan.budget == (4_000_000 if budget else 512 << 20)


def test_a_tied_embedding_is_the_head_and_some_models_have_none():
    table, linear = find_layers({"model.embed_tokens.weight": Shape((100, 64)), "a.weight": Shape((64, 64))})
    tied = head_share(planned([dataclasses.replace(table, tied=("lm_head",)), linear]))
    assert (tied.layer, tied.bytes) == ("model.embed_tokens", 100 * 64 * 2)
    assert head_share(planned([table, linear])) is None


def test_a_plan_is_a_value():
    kernels = default_registry().kernels("cpu")
    target = default_registry().device("cpu:x86_vnni")
    plan = planned(linears("a", shape=(256, 256)), "int8", kernels, target)
    assert plan == planned(linears("a", shape=(256, 256)), "int8", kernels, target)


def deepseek_v3():
    """Names and shapes of DeepSeek-V3 in BF16: 61 layers, the first 3 dense, 256 experts; 671B parameters."""
    hidden, inner, expert = 7168, 18432, 2048
    yield "model.embed_tokens.weight", (129280, hidden)
    for i in range(61):
        at = f"model.layers.{i}"
        yield f"{at}.self_attn.q_a_proj.weight", (1536, hidden)
        yield f"{at}.self_attn.q_a_layernorm.weight", (1536,)
        yield f"{at}.self_attn.q_b_proj.weight", (24576, 1536)
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (576, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", (512,)
        yield f"{at}.self_attn.kv_b_proj.weight", (32768, 512)
        yield f"{at}.self_attn.o_proj.weight", (hidden, 16384)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if i < 3:
            yield from _mlp(f"{at}.mlp", inner, hidden)
            continue
        yield f"{at}.mlp.gate.weight", (256, hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", (256,)
        yield from _mlp(f"{at}.mlp.shared_experts", expert, hidden)
        for e in range(256):
            yield from _mlp(f"{at}.mlp.experts.{e}", expert, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (129280, hidden)


def _mlp(at, inner, hidden):
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)


@pytest.fixture(scope="module")
def header_only(tmp_path_factory):
    """Shards that end right after their header, with an index: no data at all."""
    folder = tmp_path_factory.mktemp("deepseek")
    every = list(deepseek_v3())
    count, weight_map = 163, {}
    size = math.ceil(len(every) / count)
    for i in range(count):
        file, header, at = f"model-{i + 1:05d}-of-{count:05d}.safetensors", {}, 0
        for name, shape in every[i * size : (i + 1) * size]:
            weight_map[name] = file
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [at, at := at + 2 * math.prod(shape)],
            }
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_671b_from_headers_alone(header_only, record_property):
    every = list(deepseek_v3())
    elements = sum(math.prod(shape) for _, shape in every)
    assert len(every) > 45_000
    assert 670e9 < elements < 672e9
    start = time.perf_counter()
    plan = quantport.plan(header_only, "fp8_per_block", device="cuda:sm_80")
    seconds = time.perf_counter() - start
    record_property("seconds", seconds)
    print(f"{len(every)} tensors planned in {seconds:.2f} s")  # noqa: T201
    assert plan.before == 2 * elements
    kinds = [s.layer.kind for s in plan.quantized]
    assert (kinds.count("moe"), kinds.count("linear")) == (58, 61 * 5 + 3 * 3 + 58 * 3)
    assert [s.layer.experts for s in plan.quantized if s.layer.kind == "moe"] == [256] * 58
    scales = 4 * sum(
        math.ceil(n / 128) * math.ceil(k / 128) * max(1, s.layer.experts)
        for s in plan.quantized
        for _, n, k in s.layer.weights
    )
    quantized = sum(s.layer.elements for s in plan.quantized)
    assert plan.after == quantized + scales + 2 * (elements - quantized)
    assert {str(s.choice.status) for s in plan.quantized} == {"weight_only"}
    kept = {s.layer.name: s.note for s in plan.steps if not s.requested_scheme and s.layer.kind == "linear"}
    assert len(kept) == 58 + 2
    assert kept["lm_head"].startswith("output head")
    assert kept["model.layers.3.mlp.gate"].startswith("router")
    assert len(json.loads(plan.to_json())["layers"]) == len(kinds) + len(kept)


def test_671b_with_patterns(header_only):
    config = {
        "scheme": "fp8_per_block",
        "moe": "int4_wo",
        "ignore": ["re:.*kv_b_proj"],
        "targets": {"*.shared_experts.*": "int8"},
    }
    plan = quantport.plan(header_only, config=config, device="cuda:sm_90")
    asked = [s.requested_scheme for s in plan.quantized]
    assert {name: asked.count(name) for name in set(asked)} == {
        "int4_weight_only": 58,
        "int8": 58 * 3,
        "fp8_per_block": 61 * 4 + 3 * 3,
    }


def test_headers_are_enough_to_plan_but_not_to_load(header_only):
    with pytest.raises(CheckpointError):
        quantport.load(header_only, "int8", model=lambda: torch.nn.Linear(1, 1))
