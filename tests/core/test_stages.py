"""A model of several stages in one checkpoint, Qwen3-Omni: each gets the scheme of its name and a plan of its
own, and one without a scheme is what it was, to the bit.
"""

from __future__ import annotations

import pytest
import torch
from core_models import same_state
from core_omni import tiny_omni
from core_references import check_parts
from test_model_classes import distance  # what stays is multiplied by what suits its place in memory

import quantport
from quantport.errors import ConfigError
from quantport.modules import QuantModule

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
STAGES = {
    "thinker": "fp8",
    "talker": {"scheme": "int8", "ignore": ["talker.code_predictor.*"]},
    "code2wav": None,
}


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """The model in BF16, and its checkpoint."""
    model, folder = tiny_omni(), tmp_path_factory.mktemp("omni")
    model.save_pretrained(folder)
    return model, folder


def schemes_of(model):
    """Those of the quantized modules of each stage."""
    return {
        stage: {m.scheme for m in part.modules() if isinstance(m, QuantModule)}
        for stage, part in model.named_children()
    }


def test_each_stage_gets_the_scheme_of_its_name(omni):
    original, folder = omni
    model = quantport.load(folder, config=STAGES)
    assert schemes_of(model) == {"thinker": {"fp8_per_tensor"}, "talker": {"int8"}, "code2wav": set()}
    assert not any(isinstance(m, QuantModule) for m in model.talker.code_predictor.modules())
    same_state(model.code2wav, original.code2wav)
    codes = torch.randint(32, (1, 4, 6))
    assert distance(model.code2wav(codes), original.code2wav(codes)) <= 5e-3


def test_a_stage_mapped_to_null_computes_what_it_did(omni):
    original, folder = omni
    model = quantport.load(folder, config={"thinker": None, "talker": "int8", "code2wav": None})
    ids = torch.arange(10).view(1, 10)
    same_state(model.thinker, original.thinker)
    assert distance(model.thinker(input_ids=ids).logits, original.thinker(input_ids=ids).logits) <= 5e-3
    assert schemes_of(model) == {"thinker": set(), "talker": {"int8"}, "code2wav": set()}


def test_all_stages_work_together(omni):
    model = quantport.load(omni[1], config=STAGES)
    ids = torch.tensor([[80, 89, 3, 4, 5, 81, 80, 87]])
    limits = {"thinker_max_new_tokens": 4, "talker_max_new_tokens": 6, "talker_min_new_tokens": 4}
    torch.manual_seed(0)
    text, sound = model.generate(ids, speaker="a", thinker_eos_token_id=81, **limits)
    assert text.shape[1] > ids.shape[1]
    assert sound.isfinite().all()
    assert sound.numel() > 0


def test_there_is_a_plan_for_each_stage(omni):
    plan = quantport.plan(omni[1], config=STAGES)
    stages = plan.components
    assert list(stages) == ["thinker", "talker", "code2wav"]
    assert [step for part in stages.values() for step in part.steps] == sorted(
        plan.steps, key=lambda step: list(stages).index(step.layer.name.partition(".")[0])
    )
    assert sum(part.before for part in stages.values()) == plan.before
    assert sum(part.after for part in stages.values()) == plan.after
    assert stages["thinker"].quantized
    assert not stages["code2wav"].quantized
    assert stages["code2wav"].before == stages["code2wav"].after
    said = str(plan).split("\n")
    places = [said.index(f"  {stage}") for stage in stages]
    assert "fp8_per_tensor" in said[places[0] + 1]
    assert "int8" in said[places[1] + 1]
    assert "stay as stored" in said[places[2] + 1]
    assert not quantport.plan(omni[1], "int8").components
    inherited = {"scheme": "int8", "components": {**STAGES, "thinker": {"ignore": ["*.down_proj"]}}}
    part = quantport.plan(omni[1], config=inherited).components["thinker"]
    assert part.config.scheme == "int8"
    assert {step.scheme for step in part.quantized} == {"int8"}


def test_a_stage_that_nobody_maps_is_named(omni):
    with pytest.raises(ConfigError) as caught:
        quantport.load(omni[1], config={"thinker": "fp8", "talker": None})
    check_parts(caught.value, "code2wav", "thinker, talker", "null")
