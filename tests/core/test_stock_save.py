"""What stock libraries would write of a quantized model, or read of what ``save`` writes: never codes as
weights.
"""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from core_models import DENSE, MOE, Tiny, made, same_state, write
from core_references import check_parts

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError, SaveError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return quantport.load(DENSE, "int8")


def refused(save, folder):
    with pytest.raises(SaveError) as caught:
        save(folder)
    check_parts(caught.value, "quantport.save", "quantized model")
    assert not list(folder.parent.glob("**/*.safetensors"))


@pytest.mark.parametrize("part", ["", "model"])
@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
def test_saving_by_others_is_refused(model, method, part, tmp_path):
    refused(getattr(model.get_submodule(part), method), tmp_path / "out")


@pytest.mark.parametrize("scheme", ["int8", "fp8_per_block", "int4", "nf4"])
def test_of_a_model_that_is_quantized_in_place(scheme, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(MOE, dtype=torch.bfloat16)
    quantport.quantize_(model, scheme)
    refused(model.save_pretrained, tmp_path / "out")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_of_a_copy(model, copied, tmp_path):
    refused(copied(model).save_pretrained, tmp_path / "out")


def test_by_the_trainer(model, tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])
    refused(transformers.Trainer(model, arguments).save_model, tmp_path / "run" / "out")


def test_a_model_that_nobody_holds_is_freed_at_once():
    model = quantport.load(DENSE, "int8")
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_adapters_are_saved(tmp_path):
    peft = pytest.importorskip("peft")
    for model in (quantport.load(DENSE, "int8"), copy.deepcopy(quantport.load(DENSE, "int8"))):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
        model.save_pretrained(tmp_path)
        assert [p.name for p in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_what_a_model_around_a_quantized_one_writes_is_not_read_as_weights(tmp_path):
    """Nothing tells the model around it; but both have one configuration."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.bfloat16)
    quantport.quantize_(model.model, "int8")
    model.save_pretrained(tmp_path / "out")
    not_read(tmp_path / "out")


def not_read(folder):
    for cls in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        with pytest.raises(ValueError, match="quant_method"):
            cls.from_pretrained(folder)


@pytest.mark.parametrize("scheme", ["int8", "fp8_per_tensor", "int4", "mxfp8", "q4_k"])
def test_what_is_saved_is_read_by_quantport_alone(scheme, tmp_path):
    folder = quantport.save(quantport.load(DENSE, scheme), tmp_path / "out")
    not_read(folder)
    with Checkpoint.open(folder) as checkpoint:
        for name, info in checkpoint.tensors.items():
            assert info.dtype.itemsize > 1 or not name.endswith("weight"), name


@pytest.mark.parametrize("factory", [None, Tiny], ids=["transformers", "module"])
@pytest.mark.parametrize("scheme", ["int8", "fp8_per_block", "mxfp8", "int4"])
def test_checkpoints_of_format_1_are_read(scheme, factory, tmp_path):
    """They have 8-bit codes under ``weight``."""
    if factory:
        model = made()
        quantport.quantize_(model, scheme)
    else:
        model = quantport.load(MOE, scheme)
    folder = quantport.save(model, tmp_path / "new")
    with Checkpoint.open(folder) as checkpoint:
        old = {name.removesuffix("_codes"): checkpoint.read(name).clone() for name in checkpoint.tensors}
        assert (set(old) == set(checkpoint.tensors)) == (scheme == "int4")
    record = json.loads((folder / "quantport.json").read_text())
    record["format"] = 1
    write(tmp_path / "old", old, quantport__json=json.dumps(record))
    if not factory:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "quantport"}
        (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    same_state(quantport.load(tmp_path / "old", model=factory), model)


def test_without_its_record_it_is_said_to_be_quantized(tmp_path):
    for scheme, factory in (("int8", None), ("int8", Tiny), ("fp8_per_tensor", Tiny), ("int4", Tiny)):
        model = made() if factory else quantport.load(DENSE, scheme)
        if factory:
            quantport.quantize_(model, scheme)
        folder = quantport.save(model, tmp_path / f"{scheme}{factory}")
        (folder / "quantport.json").unlink()
        with pytest.raises(CheckpointError, match="quantized already") as caught:
            quantport.load(folder, model=factory)
        assert scheme == "int4" or "quantport" in caught.value.found
