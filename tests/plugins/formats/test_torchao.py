"""TorchAO checkpoints, quantized, flattened as Transformers saves them, and decoded by torchao. On a CPU it
makes no FP8 with dynamic activations, and no blocks of FP8: there the metadata are changed by hand.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core_models import same_bits
from format_checks import Made, converts, keeps, overlays, quantizable, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import junk
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    quantize_,
)
from torchao.quantization.quant_primitives import dequantize_affine

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError
from quantport.scheme.catalog import BUILTIN
from quantport_formats.torchao import TorchAo

CHECKED_BY = "torchao"

ASYMMETRIC = {"granularity": PerGroup(32), "mapping_type": MappingType.ASYMMETRIC}
CASES: dict[str, tuple[Any, str]] = {
    "int8": (Int8WeightOnlyConfig(version=2), "int8_weight_only:channel:fp32"),
    "int8 groups": (
        Int8WeightOnlyConfig(granularity=PerGroup(32), version=2),
        "int8_weight_only:g32:fp32",
    ),
    "int8 dynamic": (Int8DynamicActivationInt8WeightConfig(version=2), "int8:channel:fp32"),
    "fp8": (Float8WeightOnlyConfig(), "fp8_weight_only:channel"),
    "int4": (
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "int4_weight_only:g32:fp32:asym",
    ),
    "int4 zeros": (
        IntxWeightOnlyConfig(weight_dtype=torch.int4, **ASYMMETRIC),
        "int4_weight_only:g32:fp32:asym",
    ),
    "int6 zeros": (
        IntxWeightOnlyConfig(weight_dtype=torch.int6, **ASYMMETRIC),
        "int8_weight_only:g32:fp32:asym",
    ),
}


def stored(case: str) -> Made:
    quantizer, scheme = CASES[case]
    config, tensors = tiny()
    values, flat = {}, dict(tensors)
    for name in quantizable(tensors):
        module = torch.nn.Linear(*tensors[name].shape[::-1], bias=False, dtype=torch.bfloat16)
        module.weight = torch.nn.Parameter(tensors[name], requires_grad=False)
        quantize_(module, quantizer)
        flat[name] = module.weight
        if hasattr(module.weight, "target_dtype"):
            w = module.weight
            values[name] = dequantize_affine(
                w.qdata, w.block_size, w.scale.float(), w.zero_point, torch.int8, output_dtype=torch.float32
            )
        else:
            values[name] = module.weight.dequantize(torch.float32)
    parts, metadata = flatten_tensor_state_dict(flat)
    said = {"quant_method": "torchao", "quant_type": {"default": {"_type": type(quantizer).__name__}}}
    return Made({**config, "quantization_config": said}, parts, values, scheme, metadata=metadata)


@pytest.mark.parametrize("case", CASES)
def test_it_is_kept_to_the_bit(case, tmp_path):
    keeps(stored(case), tmp_path)


def changed(made: Made, **changes: Any) -> Made:
    for name in made.values:
        said = json.loads(made.metadata[name])
        said["_data"] |= changes
        made.metadata[name] = json.dumps(said)
    return made


def test_fp8_with_dynamic_activations(tmp_path):
    made = changed(stored("fp8"), act_quant_kwargs={"_type": "QuantizeTensorToFloat8Kwargs", "_data": {}})
    made.scheme = "fp8_per_channel"
    keeps(made, tmp_path)


def test_activations_with_zero_points_are_named(tmp_path):
    made = changed(stored("int4"), activation_quantization="int8_asym_per_token")
    with pytest.warns(UserWarning, match=r"7 weights \(.*\) are multiplied with activations in 16 bits"):
        keeps(made, tmp_path)


def test_scales_in_fp32_with_zero_points_are_decoded(tmp_path):
    made = stored("int4 zeros")
    made.tensors = {n: t.float() if n.endswith("_scale") else t for n, t in made.tensors.items()}
    with contextlib.closing(Checkpoint.open(made.write(tmp_path))) as source:
        found = TorchAo().recognize(source, made.config, BUILTIN)
        assert found is not None
        assert not found.quantized()
        assert "7 weights" in found.notices()[0]
        for name, values in made.values.items():
            assert same_bits(found.source.read(name), values), name


@pytest.mark.parametrize("case", ["int8 groups", "int4 zeros"])
def test_it_becomes_another_scheme(case, tmp_path):
    converts(stored(case), tmp_path, "fp8_per_channel")


def test_what_was_left_is_quantized(tmp_path):
    overlays(stored("int8"), tmp_path, "lm_head")


def test_zero_points_of_int8_are_refused_when_they_are_read(tmp_path):
    made = stored("int8")
    made.tensors |= {n: t + 1 for n, t in made.tensors.items() if n.endswith("_zero_point")}
    with pytest.raises(CheckpointError, match="zero points of int8 codes that are not 0"):
        quantport.load(made.write(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("_scale", None),
        ("_scale", torch.ones(3, 3)),
        ("_scale", torch.ones(128, 4, dtype=torch.int32)),
        ("_qdata", torch.ones(8, dtype=torch.int8)),
        ("_qdata", torch.ones(128, 128)),
        ("_zero_point", None),
        ("_zero_point", torch.zeros(128, 4)),
    ],
)
def test_damaged_tensors_are_refused(part, tensor, tmp_path):
    made = stored("int4")
    name = next(n for n in made.tensors if n.endswith(f"q_proj._weight{part}"))
    del made.tensors[name]
    if tensor is not None:
        made.tensors[name] = tensor
    refused(made, tmp_path)


@pytest.mark.parametrize(
    "said", [None, "{", '{"_type": "Int4Tensor", "_data": {}}', '{"_type": "Int8Tensor"}']
)
def test_damaged_metadata_are_refused(said, tmp_path):
    made = stored("int8")
    name = next(iter(made.values))
    del made.metadata[name]
    if said is not None:
        made.metadata[name] = said
    refused(made, tmp_path)


def refused(made: Made, folder: Path) -> None:
    made.write(folder)
    for call in (quantport.plan, quantport.load):
        with pytest.raises(CheckpointError) as caught:
            call(folder, device="cpu")
        assert "torchao" in caught.value.asked


keys = st.sampled_from(["block_size", "target_dtype", "activation_quantization", "act_quant_kwargs", "dtype"])


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(keys, junk | st.lists(st.integers(-1, 300), min_size=2, max_size=2)))
def test_any_metadata_are_read_or_refused(changes, codes_of_4_bits):
    made, source = codes_of_4_bits
    name = next(iter(made.values))
    said = json.loads(made.metadata[name])
    changed = json.dumps({**said, "_data": {**said["_data"], **changes}})
    source.metadata = {**made.metadata, name: changed}
    with contextlib.suppress(CheckpointError):
        found = TorchAo().recognize(source, made.config, BUILTIN)
        assert found is not None
        assert found.layers()


@pytest.fixture(scope="module")
def codes_of_4_bits(tmp_path_factory):
    made = stored("int4")
    with contextlib.closing(Checkpoint.open(made.write(tmp_path_factory.mktemp("ao")))) as source:
        yield made, source
