"""What people do with a model once it is loaded: generate in every way, pipelines, adapters."""

from __future__ import annotations

import pytest
import torch
from core_models import DENSE
from hf_models import IDS, from_pretrained, logits, save, transformers

import quantport
from quantport.modules import QuantModule

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("model"), "moe")
    return from_pretrained(folder, "int8"), quantport.load(folder, "int8", device="cpu")


def write(model, **options):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(IDS, max_new_tokens=6, **{"do_sample": False, **options}).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_it_writes_what_a_loaded_model_writes(way, models):
    found, expected = models
    assert write(found, **WAYS[way]) == write(expected, **WAYS[way])


def test_with_an_assistant(models):
    model, _ = models
    assistant = from_pretrained(model.name_or_path, "nf4")
    assert write(model, assistant_model=assistant) == write(model)


def test_it_may_be_compiled(models):
    model, _ = models
    assert model.hf_quantizer.is_compileable
    cache = transformers.StaticCache(model.config, max_cache_len=16)
    assert model._valid_auto_compile_criteria({"past_key_values": cache}, model.generation_config) == (
        model.device.type in ("cuda", "xpu", "neuron")
    )


@pytest.mark.slow
def test_a_compiled_step_computes_the_same(models):
    model, _ = models
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(IDS).logits.float(), logits(model), atol=0.05, rtol=0.05)


def test_a_pipeline():
    asked = {"quantization_config": {"quant_method": "quantport", "scheme": "int8"}}
    pipe = transformers.pipeline("text-generation", DENSE.as_posix(), model_kwargs=asked, device_map="cpu")
    assert any(isinstance(module, QuantModule) for module in pipe.model.modules())
    (written,) = pipe("The following", max_new_tokens=4, do_sample=False)
    ids = pipe.tokenizer("The following", return_tensors="pt").input_ids
    expected = quantport.load(DENSE, "int8", device="cpu").generate(ids, max_new_tokens=4, do_sample=False)
    assert written["generated_text"] == pipe.tokenizer.decode(expected[0], skip_special_tokens=True)


def test_an_adapter_trains_and_the_weights_stay(tmp_path):
    peft = pytest.importorskip("peft")
    folder = save(tmp_path, "untied")
    model = from_pretrained(folder, "int8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    config = transformers.TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to=[], max_steps=2, learning_rate=0.1, save_strategy="no"
    )
    assert model.is_quantized
    transformers.Trainer(adapted, config, train_dataset=data).train()
    assert any(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
    adapted.eval()
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(from_pretrained(folder, "int8")))
    with pytest.raises(quantport.QuantportError):
        adapted.merge_and_unload()
    for name, tensor in adapted.unload().state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_quantized_model_alone_is_not_trained(models, tmp_path):
    config = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(models[0], config)
