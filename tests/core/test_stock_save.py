"""What stock libraries would write of a quantized model, or read of what ``save`` writes: never codes as
weights.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from core_models import DENSE, MOE, Tiny, made, same_state, write
from core_references import check_parts
from core_tiny import tiny_config
from core_transformers import tiny
from torch import nn

import quantport
from quantport.checkpoint import Checkpoint
from quantport.errors import CheckpointError, SaveError

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(autouse=True)
def _without_plugin(monkeypatch):
    """Another test of this process may have imported quantport_transformers, with which what is saved is
    read.
    """
    stock = transformers.quantizers.auto.AutoHfQuantizer
    for name in ("supports_quant_method", "merge_quantization_configs"):
        monkeypatch.setattr(stock, name, staticmethod(inspect.unwrap(getattr(stock, name))))


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


class OfTheHub(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.part = made()


def encoder_decoder():
    """Transformers looks for no mark in the configuration of an encoder."""
    encoder, decoder = (tiny_config(transformers.BertConfig, own) for own in ({}, DECODES))
    return transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(encoder), decoder=transformers.BertLMHeadModel(decoder)
    )


DECODES = {"is_decoder": True, "add_cross_attention": True}
WHOLES = {
    "model": (lambda: tiny("llama"), "model"),
    "layers.0": (lambda: tiny("llama"), "model.layers.0"),
    "vision": (lambda: tiny("llava"), "model.vision_tower"),
    "encoder": (encoder_decoder, "encoder"),
    "hub": (OfTheHub, "part"),
}


@pytest.mark.parametrize("name", WHOLES)
def test_a_model_with_a_quantized_part_is_not_saved_by_others(name, tmp_path):
    make, part = WHOLES[name]
    model = make()
    quantport.quantize_(model.get_submodule(part), "int8")
    refused(model.save_pretrained, tmp_path / "out")
    refused(lambda folder: type(model).save_pretrained(model, folder), tmp_path / "out")


def test_what_is_not_quantized_is_saved_as_ever(tmp_path):
    for i, model in enumerate((tiny("llama"), tiny("llava"), OfTheHub())):
        model.save_pretrained(tmp_path / str(i))
        assert list((tmp_path / str(i)).glob("*.safetensors"))


@pytest.mark.parametrize("part", ["model", "model.layers", "model.layers.1"])
def test_what_is_written_of_the_state_of_a_quantized_model_is_not_read_as_weights(part, tmp_path):
    """As accelerate does; the blocks of a model have one configuration with it."""
    model = tiny("llama")
    quantport.quantize_(model.get_submodule(part), "int8")
    model.config.save_pretrained(write(tmp_path / "out", model))
    not_read(tmp_path / "out")


def test_a_copy_in_another_process_is_not_saved_by_others(model, tmp_path):
    (tmp_path / "copy").write_bytes(pickle.dumps(model))
    code = f"import pickle; pickle.load(open({str(tmp_path / 'copy')!r}, 'rb')).save_pretrained('out')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "SaveError" in done.stderr
    assert not (tmp_path / "out").exists()


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
