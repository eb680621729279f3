"""The files beside the weights of a saved model: those of its source, and what says how it is now."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from core_models import DENSE, MOE, ids

import quantport
from quantport.checkpoint import companions

transformers = pytest.importorskip("transformers")
KEPT = (
    "LICENSE",
    "README.md",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "modeling_mine.py",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "spiece.model",
    "tekken.json",
    "vocab.txt",
)
LEFT = (
    ".env",
    ".git/config",
    "__pycache__/modeling_mine.pyc",
    "adapter_config.json",
    "checkpoint-7/model.safetensors",
    "checkpoint-7/trainer_state.json",
    "consolidated.safetensors",
    "deep/deeper/notes.txt",
    "hf_quant_config.json",
    "model.onnx",
    "optimizer.pt",
    "original/consolidated.00.pth",
    "original/params.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "quant_model_description.json",
    "quantize_config.json",
    "quantport.json",
    "recipe.yaml",
)


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_companions_are_what_is_there(tmp_path):
    folder = fill(tmp_path / "source", (*KEPT, *LEFT, "config.json", "model.safetensors"))
    assert sorted(companions(folder)) == sorted(KEPT)


def test_links_stay_inside(tmp_path):
    folder = fill(tmp_path / "source", ("real.json", "folder/inner.txt"))
    secret = fill(tmp_path, ("secret.txt",)) / "secret.txt"
    (folder / "inside.json").symlink_to("real.json")
    assert companions(folder).keys() == {"real.json", "inside.json", "folder/inner.txt"}
    for name, target in (
        ("out.json", "../secret.txt"),
        ("absolute.json", secret),
        ("loop", "."),
        ("broken.json", "nothing"),
        ("itself.json", "itself.json"),
        ("folder/itself", "itself"),
        ("around.json", "folder/../around.json"),
        ("folder/up.txt", "../../secret.txt"),
    ):
        (folder / name).symlink_to(target)
        with pytest.warns(UserWarning, match="a link to"):
            assert companions(folder).keys() == {"real.json", "inside.json", "folder/inner.txt"}
        (folder / name).unlink()


def test_a_linked_directory_and_a_snapshot_of_the_hub(tmp_path):
    """A snapshot is a folder of links to blobs, which lie two folders above."""
    model = tmp_path / "models--org--name"
    fill(model / "blobs", ("abc", "def"))
    snapshot = model / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "modeling.py").symlink_to("../../blobs/def")
    (tmp_path / "short").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "short"):
        assert {n: p.read_text() for n, p in companions(folder).items()} == {
            "tokenizer.json": "abc",
            "modeling.py": "def",
        }
    (snapshot / "more.json").symlink_to("../../refs")
    with pytest.warns(UserWarning, match="more.json"):
        assert "more.json" not in companions(snapshot)


@pytest.fixture
def source(tmp_path):
    shutil.copytree(DENSE, tmp_path / "source")
    mine = ("consolidated.safetensors", "quantport.json")  # these would be read
    return fill(tmp_path / "source", (*KEPT, *(name for name in LEFT if name not in mine)))


def test_files_of_the_source_come_along(source, tmp_path):
    out = quantport.save(quantport.load(source, "int8"), tmp_path / "out")
    files = sorted(os.path.relpath(p, out) for p in out.rglob("*") if p.is_file())
    own = ["config.json", "generation_config.json", "model.safetensors", "quantport.json"]
    assert files == sorted({*KEPT, *own, "tokenizer.json", "tokenizer_config.json"})
    for name in KEPT:
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("path", [DENSE, MOE], ids=lambda p: p.name)
def test_saving_twice_gives_the_same_bytes(path, tmp_path):
    one = quantport.save(quantport.load(path, "int8"), tmp_path / "one")
    again = quantport.load(one)
    folders = [one, quantport.save(again, tmp_path / "two"), quantport.save(again, tmp_path / "three")]
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1] == contents[2]
    for text in (contents[1][name].decode() for name in ("config.json", "generation_config.json")):
        assert str(tmp_path) not in text
        assert "_name_or_path" not in text


def test_the_configurations_are_those_of_the_model_as_it_is(tmp_path):
    model = quantport.load(DENSE, "int8")
    model.generation_config.max_new_tokens = 3
    model.generation_config.do_sample = False
    model.config.architectures = ["SomebodyElse"]
    out = quantport.save(model, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    again = quantport.load(out)
    assert again.generation_config.max_new_tokens == 3
    assert torch.equal(again.generate(ids[:1]), model.generate(ids[:1]))


def test_a_model_in_memory_has_its_configurations_too(tmp_path):
    """Of a base class, under a source whose configuration names the class with a head."""
    model = transformers.AutoModel.from_pretrained(DENSE, dtype=torch.bfloat16)
    quantport.quantize_(model, "int8")
    out = quantport.save(model, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    assert (out / "tokenizer.json").exists()
    assert type(quantport.load(out)).__name__ == "LlamaModel"


def test_the_configuration_of_a_model_of_diffusers(tmp_path):
    models = pytest.importorskip("diffusers.models.transformers.prior_transformer")
    made = models.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=32, num_embeddings=3
    )
    quantport.quantize_(made.to(torch.bfloat16), "int8")
    config = json.loads((quantport.save(made, tmp_path / "out") / "config.json").read_text())
    assert config["_class_name"] == "PriorTransformer"
    assert config["embedding_dim"] == 32
    assert "quant_method" not in config["quantization_config"]
    with pytest.raises(quantport.QuantportError, match=r"quantport\.save"):
        made.save_pretrained(tmp_path / "stock")
