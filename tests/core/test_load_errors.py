"""Bad input to load: an error in three parts that names what is wrong, before or instead of a half loaded
model.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from core_models import DENSE, MOE, Moe, Tiny, made, write
from core_references import check_parts
from core_transformers import checkpoint
from core_transformers import tiny as tiny_of_transformers
from torch import nn

import quantport
from quantport.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DeviceError,
    QuantportError,
    UnsupportedError,
    WeightError,
)
from quantport.model.roles import SkipCode
from quantport.planning.plan import BUDGET
from quantport.plugins.registry import default_registry


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tiny") / "c", made())


def refused(kind, source, scheme="int8", named=(), **options):
    threads, register = torch.get_num_threads(), nn.Module.register_parameter
    with pytest.raises(kind) as caught:
        quantport.load(source, scheme, **options)
    assert isinstance(caught.value, QuantportError)
    check_parts(caught.value, *named)
    assert torch.get_num_threads() == threads
    assert nn.Module.register_parameter is register


def state(**changes):
    out = made().state_dict()
    for name, tensor in changes.items():
        out[name.replace("__", ".")] = tensor
    return out


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weight_is_refused_by_name(tmp_path, value):
    tensors = state()
    tensors["moe.experts.1.up_proj.weight"][3, 4] = value
    folder = write(tmp_path / "c", tensors)
    refused(WeightError, folder, model=Tiny, named=["moe.experts.1.up_proj", "nonfinite='zero'"])
    model = quantport.load(folder, config={"scheme": "int8", "nonfinite": "zero"}, model=Tiny)
    assert model.moe.experts[1].up_proj.stored_weight()["weight"][3, 4] == 0


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "up.bias", "norm.bias", "down.weight", "moe.experts.0.up_proj.weight"]
)
def test_missing_tensor_is_named(tmp_path, name):
    refused(
        CheckpointError,
        write(tmp_path / "c", {n: t for n, t in state().items() if n != name}),
        model=Tiny,
        named=[name.rpartition(".")[0]],
    )


@pytest.mark.parametrize("name", ["embed_tokens.weight", "up.weight", "up.bias", "norm.weight", "offset"])
def test_tensor_of_another_shape_is_named(tmp_path, name):
    """Not found out later by an error of torch, or never."""
    tensors = state()
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    refused(
        CheckpointError, write(tmp_path / "c", tensors), model=Tiny, named=[name.rpartition(".")[0] or name]
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.complex64])
@pytest.mark.parametrize("name", ["norm.weight", "up.bias", "narrow.bias"])
def test_numbers_of_another_kind_are_named(tmp_path, name, dtype):
    tensors = state()
    tensors[name] = torch.ones_like(tensors[name], dtype=dtype)
    named = [name, str(dtype), "floats"]
    refused(CheckpointError, write(tmp_path / "c", tensors), model=Tiny, named=named)


def test_a_model_with_other_sizes_than_the_checkpoint(tmp_path):
    config = {**json.loads((DENSE / "config.json").read_text()), "intermediate_size": 352}
    tensors = {
        n: t
        for n, t in quantport.load(DENSE, config={"linear": None}).state_dict().items()
        if n != "lm_head.weight"
    }
    refused(CheckpointError, write(tmp_path / "c", tensors, config__json=json.dumps(config)), named=["mlp"])


MARKS = {
    "gptq": ({"a.qweight": torch.zeros(4, 4, dtype=torch.int32)}, {}, "GPTQ"),
    "float8": ({"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, {}, "FP8"),
    "block fp8": (
        {
            "a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
            "a.weight_scale_inv": torch.ones(1, 1),
        },
        {},
        "block-wise FP8",
    ),
    "compressed": ({"a.weight_packed": torch.zeros(4, 1, dtype=torch.int32)}, {}, "compressed-tensors"),
    "bitsandbytes": (
        {"a.weight": torch.zeros(8, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1)},
        {},
        "bitsandbytes",
    ),
    "mxfp4": (
        {
            "a.gate_up_proj_blocks": torch.zeros(4, 4, 2, 16, dtype=torch.uint8),
            "a.gate_up_proj_scales": torch.zeros(4, 4, 2, dtype=torch.uint8),
        },
        {},
        "MXFP4",
    ),
    "int8 of nobody": ({"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, {}, "not known"),
    "int32 of nobody": ({"a.weight": torch.zeros(4, 4, dtype=torch.int32)}, {}, "not known"),
    "fused int8": ({"a.experts.down_proj": torch.zeros(2, 4, 4, dtype=torch.int8)}, {}, "not known"),
    "LLM.int8": ({"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.SCB": torch.ones(4)}, {}, "LLM.int8"),
    "config": (
        {"a.W_q": torch.zeros(4, 4, dtype=torch.uint8)},
        {"config__json": '{"quantization_config": {"quant_method": "eetq"}}'},
        "EETQ",
    ),
}


@pytest.mark.parametrize("mark", MARKS)
def test_quantized_already(tmp_path, mark):
    tensors, files, method = MARKS[mark]
    folder = write(tmp_path / "c", tensors, **files)
    refused(
        CheckpointError,
        folder,
        model=lambda: nn.ModuleDict({"a": nn.Linear(4, 4)}),
        named=[method, "quantized already", "16-bit"],
    )
    with pytest.raises(CheckpointError, match=method):
        quantport.plan(folder, "int8")


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitnet"])
def test_a_configuration_over_16_bit_weights_is_said_to_be_stale(tmp_path, method):
    """Refused all the same: bitnet, for one, quantizes such weights while it loads."""
    text = json.dumps({"quantization_config": {"quant_method": method}})
    tensors = {**state(), "position_ids": torch.arange(8)[None]}
    folder = write(tmp_path / "c", tensors, config__json=text)
    refused(CheckpointError, folder, model=Tiny, named=[repr(method), "stale", "no tensor is quantized"])
    with pytest.raises(CheckpointError, match="stale"):
        quantport.plan(folder, "int8")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("norm.weight_scale", torch.ones(1)),
        ("norm.weight_scale_inv", torch.ones(2, 2)),
        ("num_blocks", torch.tensor(3)),
        ("patch_blocks", torch.zeros(3, 3, dtype=torch.uint8)),
        ("stats.absmax", torch.ones(3)),
        ("up.qweight", torch.ones(3, 3)),
        ("norm.num_weight", torch.tensor(4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_is_no_mark_of_quantization(tmp_path, name, tensor):
    path, _, leaf = name.rpartition(".")

    def factory():
        model = Tiny()
        inner = model
        for part in filter(None, path.split(".")):
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        inner.register_buffer(leaf, torch.zeros_like(tensor))
        return model

    model = quantport.load(write(tmp_path / "c", state() | {name: tensor}), "int8", model=factory)
    assert torch.equal(model.get_buffer(name), tensor)
    assert model.up.scheme == "int8"


def test_not_enough_memory_is_predicted(tiny):
    plan = quantport.plan(tiny, "int8")
    small = dataclasses.replace(default_registry().device("cpu"), memory=plan.after + BUDGET - 1)
    refused(BudgetError, tiny, device=small, model=Tiny, named=["GiB", "int4"])
    enough = dataclasses.replace(small, memory=plan.after + BUDGET + 1)
    assert quantport.load(tiny, "int8", device=enough, model=Tiny)


@pytest.mark.parametrize(
    ("scheme", "options", "kind", "named"),
    [
        ("int9", {}, ConfigError, ["'int9'", "did you mean 'int8'", "fp8_per_tensor"]),
        ("int8", {"device": "cpuu"}, DeviceError, ["'cpuu'", "did you mean 'cpu'"]),
        ("int8", {"device": "cpu:x86_vni"}, DeviceError, ["did you mean 'x86_vnni'"]),
        ("int8", {"device": "cpu:7"}, DeviceError, ["cpu:7"]),
        ("int8", {"device": "cuda:sm_80"}, DeviceError, ["cuda:sm_80", "plan"]),
        ("int8", {"config": {"scheme": "fp8"}}, ConfigError, ["int8", "fp8_per_tensor", "one"]),
        ("int8", {"config": {"linaer": None}}, ConfigError, ["linaer"]),
        ("int8", {"config": {"ignore": ["q_proj"]}}, ConfigError, ["'q_proj'"]),
        ("int8", {"config": {"transformer": {"method": "int8"}}}, ConfigError, ["transformer"]),
        ("int8", {"fallback": "no"}, ConfigError, ["fallback", "reference"]),
        ("int8", {"dtype": torch.int8}, QuantportError, ["int8", "bfloat16"]),
        ("int8", {"dtype": torch.float64}, QuantportError, ["float64", "bfloat16"]),
        ("int8", {"workers": 0}, ConfigError, ["workers=0", "number of threads"]),
        ("int8", {"workers": "all"}, ConfigError, ["workers='all'"]),
        ("int8", {"workers": 1.5}, ConfigError, ["workers=1.5"]),
        ("int8", {"dtype": "bfloat17"}, QuantportError, ["bfloat17", "bfloat16"]),
    ],
)
def test_wrong_arguments(tiny, scheme, options, kind, named):
    refused(kind, tiny, scheme, model=Tiny, named=named, **options)


def test_two_spellings_of_one_scheme_are_no_conflict(tiny):
    for config in ("w8a8", {"method": "int8_w8a8"}):
        assert quantport.load(tiny, "int8", config=config, model=Tiny).up.scheme == "int8"
    model = quantport.load(tiny, "w4a16", config={"scheme": "int4_wo", "group_size": 32}, model=Tiny)
    assert model.up.scheme == "int4_weight_only_g32"


def test_strict_fallback(tiny):
    """fp8 activations on a host processor: nothing multiplies them natively."""
    refused(
        UnsupportedError,
        tiny,
        "fp8_per_block",
        fallback="error",
        model=Tiny,
        named=["fp8_per_block", "fallback='error'", "e4m3fn"],
    )


@pytest.mark.parametrize("source", ["nothing/here/at/all", "tiny", "file.bin"])
def test_nothing_to_load(tmp_path, source):
    (tmp_path / "file.bin").write_bytes(b"x")
    (tmp_path / "tiny").mkdir()
    refused(CheckpointError, tmp_path / source, model=Tiny, named=[source.split("/")[0]])


@pytest.mark.parametrize("source", ["x/" + "a" * 300, "/tmp/" + "a" * 300, "~nobody-of-this-name/x"])
def test_a_path_that_cannot_be(source):
    refused(CheckpointError, source, model=Tiny, named=[source[:9]])


def test_no_config_json(tiny):
    refused(CheckpointError, tiny, named=["config.json", "model="])


CONFIG = json.loads((DENSE / "config.json").read_text())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", ["config.json", "JSON"]),
        ("[]", ["config.json"]),
        ("{}", ["model="]),
        (
            json.dumps({**CONFIG, "architectures": ["NoSuchModelForCausalLM"]}),
            ["NoSuchModelForCausalLM", "model="],
        ),
        (json.dumps({**CONFIG, "architectures": []}), ["architecture", "model="]),
        (json.dumps({**CONFIG, "architectures": ["AutoTokenizer"]}), ["AutoTokenizer", "model="]),
        (json.dumps({**CONFIG, "model_type": "no_such_type"}), ["no_such_type", "model="]),
        (json.dumps({**CONFIG, "hidden_size": -4}), ["model="]),
        (json.dumps({**CONFIG, "quantization_config": [1]}), ["config.json"]),
    ],
    ids=str.split(
        "no-json list empty unknown-architecture no-architecture no-model unknown-type "
        "negative-size odd-quantization"
    ),
)
def test_config_json_that_nobody_can_build(tmp_path, text, named):
    refused(CheckpointError, write(tmp_path / "c", made(), config__json=text), named=named)


@pytest.mark.parametrize("text", ["[1]", "{", '"x"', "", '{"a":' * 5000])
def test_generation_config_json_that_nobody_can_read(tmp_path, text):
    folder = checkpoint(tmp_path / "c", tiny_of_transformers("llama"))
    (folder / "generation_config.json").write_text(text)
    refused(CheckpointError, folder, named=["Transformers says", "model="])
    assert "planned by names" in quantport.plan(folder, "int8").warnings[-1]


def test_a_factory_that_makes_something_else(tiny):
    refused(QuantportError, tiny, model=lambda: nn.ModuleDict({"other": nn.Linear(3, 3)}), named=["other"])
    refused(QuantportError, tiny, model=lambda: 3, named=["int"])


def test_a_factory_that_raises_leaves_torch_as_it_was(tiny):
    register = nn.Module.register_parameter
    with pytest.raises((QuantportError, ZeroDivisionError)):
        quantport.load(tiny, "int8", model=lambda: 1 // 0)
    assert nn.Module.register_parameter is register


def test_tensors_that_the_model_does_not_have_are_said(tmp_path):
    """Transformers warns of unexpected keys; a plan that names them does too."""
    folder = write(tmp_path / "c", {**state(), "extra.weight": torch.ones(4, 4), "more": torch.ones(3)})
    with pytest.warns(UserWarning, match=r"no place for them: extra, more \(0\.0 MB\)"):
        model = quantport.load(folder, "int8", model=Tiny)
    steps = model.quantport_plan.by_layer
    for name, why in (("extra", "no module"), ("more", "Tiny of the model has no more")):
        assert steps[name].skip_reason.code is SkipCode.NO_MODULE
        assert why in steps[name].note
        assert steps[name].after == 0
    assert "extra" not in dict(model.named_modules())


def test_truncated_file(tmp_path):
    folder = write(tmp_path / "c", made())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(CheckpointError, folder, model=Tiny, named=["truncated"])


def test_missing_shard(tmp_path):
    for file in MOE.iterdir():
        if not file.name.startswith("model-00002"):
            (tmp_path / file.name).symlink_to(file)
    refused(CheckpointError, tmp_path, named=["model-00002-of-00005.safetensors"])


def test_a_module_of_another_kind_is_left_alone(tmp_path):
    class Mine(nn.Linear):
        pass

    def factory():
        return nn.ModuleDict({"a": Mine(8, 8), "b": nn.Linear(8, 8), "moe": Moe()})

    model = quantport.load(write(tmp_path / "c", made(factory)), "int8", model=factory)
    step = model.quantport_plan.by_layer["a"]
    assert step.skip_reason.code is SkipCode.OTHER_LINEAR
    assert "Mine" in step.note
    assert type(model["a"]) is Mine
    assert torch.equal(model["a"].weight, made(factory)["a"].weight)
