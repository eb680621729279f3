"""The classes of the sweep by the third way: ``from_pretrained`` gives the bits of ``load``."""

from __future__ import annotations

import pytest
import torch
import transformers
from core_models import same_state
from core_omni import tiny_omni
from core_tiny import output_of, tiny_model
from test_model_classes import CLASSES, SCHEME, distance

import quantport
from quantport_transformers import QuantportConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*of the bytes of matrices are quantized:UserWarning")


@pytest.mark.parametrize("name", CLASSES)
def test_from_pretrained_is_load(name, tmp_path):
    tiny_model(name, CLASSES[name]).save_pretrained(tmp_path)
    loaded = quantport.load(tmp_path, SCHEME)
    model = getattr(transformers, name).from_pretrained(
        tmp_path, dtype="auto", quantization_config=QuantportConfig(SCHEME)
    )
    same_state(model, loaded)
    assert {s.layer.name: s.scheme for s in model.quantport_plan.steps} == {
        s.layer.name: s.scheme for s in loaded.quantport_plan.steps
    }
    buffers = dict(loaded.named_buffers())  # such as tables of positions, which are in no state dict
    for path, buffer in model.named_buffers():
        assert buffer.dtype is buffers[path].dtype
        assert buffer.layout is not torch.strided or torch.equal(buffer, buffers[path]), path
    # what stays is multiplied by what suits its place in memory
    assert distance(output_of(model), output_of(loaded)) <= 5e-3


def test_the_stages_of_a_model_get_their_own_schemes(tmp_path):
    original, stages = tiny_omni(), {"thinker": "fp8", "talker": "int8", "code2wav": None}
    original.save_pretrained(tmp_path)
    model = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        tmp_path, dtype="auto", quantization_config=QuantportConfig(components=stages)
    )
    same_state(model, quantport.load(tmp_path, config=stages))
    same_state(model.code2wav, original.code2wav)
    assert [bool(part.quantized) for part in model.quantport_plan.components.values()] == [True, True, False]
