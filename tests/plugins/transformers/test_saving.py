"""What ``save_pretrained`` writes is loaded by Transformers alone where a format holds it, and comes back to
the same bits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from core_models import same_state
from core_references import check_parts
from hf_models import IDS, WIDE, QuantportConfig, from_pretrained, logits, qwen3_moe, save, transformers

import quantport
from quantport.errors import ConfigError, SaveError

OWN = "quantport"
# what is saved of a model, and the format that it is saved in
CASES = {
    ("untied", "int8"): "compressed-tensors",
    ("tied", "int8_weight_only"): "compressed-tensors",
    ("untied", "fp8_per_channel"): "compressed-tensors",
    ("untied", "fp8_per_block"): "compressed-tensors",
    ("untied", "int4_weight_only_g32"): "compressed-tensors",
    ("untied", "mxfp4"): "compressed-tensors",
    ("untied", "mxfp8"): "mxfp8",
    ("untied", "nf4"): OWN,
    ("untied", "int4"): OWN,
    ("moe", "int4_weight_only_g32"): "compressed-tensors",
    ("moe", "mxfp4"): "compressed-tensors",
    ("moe", "fp8_per_block"): "fp8",
    ("moe", "mxfp8"): "mxfp8",
    ("moe", "int8"): OWN,
    ("moe", "fp8_per_channel"): OWN,
}
SIZES = {"moe": {**WIDE, "moe_intermediate_size": 128}}


def saved(folder, kind, scheme):
    """A model, and the directory that it was saved in."""
    model = from_pretrained(save(folder / "16-bit", kind, **SIZES.get(kind, WIDE)), scheme)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.save_pretrained(folder / "saved")
    return model, folder / "saved", [str(w.message) for w in said]


def method(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"].get("quant_method", OWN)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_it_is_read_by_transformers_and_comes_back(kind, scheme, tmp_path):
    model, folder, said = saved(tmp_path, kind, scheme)
    expected = CASES[kind, scheme]
    assert method(folder) == expected
    assert bool(said) == (expected == OWN), said
    again = from_pretrained(folder) if expected == OWN else from_pretrained(folder, None)
    same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    if expected != OWN:
        theirs, decoded = logits(by_transformers(folder, expected)), logits(from_pretrained(folder, "bf16"))
        assert (theirs - decoded).norm() < 0.03 * decoded.norm()


def by_transformers(folder, name):
    """What Transformers loads without quantport, decoded, since its kernels need a GPU."""
    compressed = name == "compressed-tensors"
    cls = transformers.CompressedTensorsConfig if compressed else transformers.FineGrainedFP8Config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a configuration is given
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=cls(dequantize=True)
        )


@pytest.mark.slow
def test_without_the_plugin_it_is_loaded_or_refused(tmp_path):
    folders = [saved(tmp_path / scheme, "untied", scheme)[1] for scheme in ("int8", "nf4")]
    code = (
        "import sys, torch, warnings; warnings.simplefilter('ignore')\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folders[0])!r})\n"
        f"torch.save(model(torch.tensor({IDS.tolist()})).logits.float(), {str(tmp_path / 'logits')!r})\n"
        "assert not any(name.startswith('quantport') for name in sys.modules)\n"
        f"AutoModelForCausalLM.from_pretrained({str(folders[1])!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search("ValueError: .* no `quant_method`", done.stderr), done.stderr
    expected = logits(from_pretrained(folders[0], None))
    assert (torch.load(tmp_path / "logits") - expected).norm() < 0.05 * expected.norm()


def test_what_quantport_saved_is_loaded(tmp_path):
    model = quantport.load(save(tmp_path / "16-bit", "moe"), "int8", device="cpu")
    folder = quantport.save(model, tmp_path / "saved")
    same_state(from_pretrained(folder), model)
    same_state(from_pretrained(folder, None), model)


def test_what_is_saved_is_quantized_by_the_scheme_that_is_asked_for(tmp_path):
    _, folder, _ = saved(tmp_path, "untied", "int8")
    same_state(from_pretrained(folder, "nf4"), quantport.load(folder, "nf4", device="cpu"))


@pytest.mark.parametrize(
    "asked", [{"scheme": "int8"}, {"ignore": ["lm_head"]}, {"targets": {"lm_head": "nf4"}}]
)
def test_what_only_quantport_reads_is_not_quantized_anew(asked, tmp_path):
    _, folder, _ = saved(tmp_path, "untied", "nf4")
    with pytest.raises(ConfigError) as caught:
        from_pretrained(folder, quantization_config=QuantportConfig(**asked))
    check_parts(caught.value, "quantized already", "without scheme")


def test_nor_read_by_others(tmp_path):
    _, folder, _ = saved(tmp_path, "untied", "nf4")
    with pytest.raises(ConfigError) as caught:
        from_pretrained(folder, quantization_config=transformers.QuantoConfig("int8"))
    check_parts(caught.value, "QuantoConfig", "quantport has quantized the checkpoint", "QuantportConfig")


def test_files_of_others_stay_and_weights_of_before_go(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "quantport.json"):
        (folder / name).write_text("before")
    model, _, _ = saved(tmp_path, "untied", "int8")
    assert (folder / "tokenizer.json").read_text() == "before"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    same_state(from_pretrained(folder, None), model)


def test_shards_have_the_size_that_is_asked_for(tmp_path):
    model = from_pretrained(save(tmp_path / "16-bit", "untied"), "int8")
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    same_state(from_pretrained(tmp_path / "saved", None), model)


def test_another_process_than_the_main_one_writes_nothing(tmp_path):
    model = from_pretrained(save(tmp_path / "16-bit", "untied"), "int8")
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "asked",
    [
        {"state_dict": {}},
        {"variant": "fp16"},
        {"save_original_format": False},
        {"distributed_checkpoint": True},
    ],
)
def test_what_has_no_meaning_is_refused(asked, tmp_path):
    model = from_pretrained(save(tmp_path / "16-bit", "untied"), "int8")
    with pytest.raises(SaveError) as caught:
        model.save_pretrained(tmp_path / "saved", **asked)
    check_parts(caught.value, "save_pretrained", f"without {next(iter(asked))}")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_it_is_pushed_to_the_hub(how, tmp_path, monkeypatch):
    from transformers.utils import hub

    model = from_pretrained(save(tmp_path / "16-bit", "untied"), "int8")
    pushed = {}

    class Repository:
        repo_id = "somebody/name"

    class Api:
        def create_repo(self, *args, **options):
            return Repository

    def upload(self, folder, repo_id, files_timestamps, **options):
        names = {path.name for path in type(tmp_path)(folder).iterdir()} - {"README.md"}
        pushed[repo_id] = names, method(type(tmp_path)(folder))

    class Card:
        def save(self, path):
            pass

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: Card())
    monkeypatch.setattr("quantport_transformers.save.create_repo", lambda *args, **options: Repository)
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    if how == "push_to_hub":
        model.push_to_hub("name")
    else:
        model.save_pretrained(tmp_path / "name", push_to_hub=True)
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert pushed == {"somebody/name": (files, "compressed-tensors")}


def test_by_the_trainer(tmp_path):
    model = from_pretrained(save(tmp_path / "16-bit", "untied"), "int8")
    config = transformers.TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    transformers.Trainer(adapted, config).save_model(tmp_path / "adapter")
    assert [p.name for p in (tmp_path / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_a_model_that_quantport_did_not_load_so_is_not_saved_so(tmp_path):
    model = qwen3_moe()
    quantport.quantize_(model, "int8")
    with pytest.raises(SaveError, match=r"quantport\.save"):
        model.save_pretrained(tmp_path / "saved")


def test_what_no_module_holds_is_decoded(tmp_path):
    """Experts with an activation that quantport does not run, stored as codes."""
    folder = saved(tmp_path, "moe", "int4_weight_only_g32")[1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "tanh"}))
    model, info = from_pretrained(folder, None, output_loading_info=True)
    assert not any(info.values()), info
    assert "Qwen3MoeExperts" in {type(m).__name__ for m in model.modules()}
    expected = quantport.load(folder, device="cpu")
    same_state(model, expected)
    assert torch.equal(logits(model), logits(expected))


def test_a_layer_of_another_class_is_decoded(tmp_path, monkeypatch):
    from transformers import core_model_loading
    from transformers.models.llama import modeling_llama

    class OtherLinear(torch.nn.Linear):
        pass

    folder = saved(tmp_path, "untied", "int8")[1]
    mlp = modeling_llama.LlamaMLP

    class OtherMLP(mlp):
        def __init__(self, config):
            super().__init__(config)
            self.down_proj = OtherLinear(config.intermediate_size, config.hidden_size, bias=False)

    loaded, real = [], core_model_loading.set_param_for_module
    monkeypatch.setattr(modeling_llama, "LlamaMLP", OtherMLP)
    monkeypatch.setattr(
        core_model_loading,
        "set_param_for_module",
        lambda model, name, *a: loaded.append(name) or real(model, name, *a),
    )
    model, info = from_pretrained(folder, None, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model.model.layers[0].mlp.down_proj) is OtherLinear
    assert "model.norm.weight" in loaded
    assert not [name for name in loaded if "down_proj" in name], "codes"
    same_state(model, quantport.load(folder, device="cpu"))
