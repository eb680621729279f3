"""Tiny pipelines of five kinds, quantized while they load: the bits of ``load``, saved and loaded again."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from core_models import same_state
from core_references import check_parts
from diffusers import DiffusionPipeline, FluxTransformer2DModel, WanTransformer3DModel
from skimage.metrics import structural_similarity
from tiny_pipelines import PIPELINES, STEPS, absent, loaded, saved

import quantport
import quantport_transformers  # noqa: F401  # for text encoders
from quantport.errors import CheckpointError, ConfigError, DeviceError, QuantportError, SaveError
from quantport.modules import QuantLinear
from quantport_diffusers import PipelineConfig, QuantportConfig, compare, load_pipeline, plans
from quantport_diffusers.compare import distance

pytestmark = pytest.mark.filterwarnings("ignore:.*of the bytes of matrices are quantized:UserWarning")
FACTORIES = {"flux": FluxTransformer2DModel, "wan": WanTransformer3DModel}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = saved(name, tmp_path_factory.mktemp("pipelines") / name)
        return made[name]

    return folder


def quantized(pipe):
    return {n for n, m in pipe.transformer.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_draws_nearly_what_it_drew(name, folders):
    folder, call = folders(name)
    plain, pipe = loaded(folder), load_pipeline(folder, "int8", dtype=torch.bfloat16, **absent(folder))
    pipe.set_progress_bar_config(disable=True)
    assert quantized(pipe)
    assert plans(pipe) == {"transformer": pipe.transformer.quantport_plan}
    same, apart = compare(plain, plain, seed=3, **call), compare(plain, pipe, seed=3, **call)
    assert same.result.psnr == float("inf")
    assert same.result.ssim == pytest.approx(1)
    assert len(apart.steps) == STEPS
    assert 15 < apart.result.psnr < float("inf")
    assert apart.steps[0].psnr >= 25  # of which each step adds its own error
    assert all(step.ssim is None or step.ssim > 0.5 for step in apart.steps)
    assert apart.picture.size == (2 * call["width"], call["height"])
    left, right = (np.asarray(apart.picture)[:, x : x + call["width"]] for x in (0, call["width"]))
    assert np.array_equal(left, np.asarray(same.picture)[:, : call["width"]])
    assert not np.array_equal(left, right)
    again = compare(plain, pipe, seed=3, **call)
    assert (again.steps, again.result) == (apart.steps, apart.result)


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "int4_weight_only_g32", "nf4"])
@pytest.mark.parametrize("name", FACTORIES)
def test_it_has_the_bits_of_load(name, scheme, folders):
    folder = folders(name)[0] / "transformer"
    kind = FACTORIES[name]
    config = kind.load_config(folder)
    model = kind.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=QuantportConfig(scheme))
    twin = quantport.load(folder, scheme, model=lambda: kind.from_config(config), dtype=torch.bfloat16)
    same_state(model, twin)
    assert model.quantport_plan.by_layer.keys() == twin.quantport_plan.by_layer.keys()
    assert not any(p.is_meta for p in model.parameters())


def test_what_the_class_keeps_in_fp32_stays_there(folders):
    model = load_pipeline(folders("wan")[0], "int8", dtype=torch.bfloat16, **absent(folders("wan")[0]))
    kept = {name for name, p in model.transformer.named_parameters() if p.dtype is torch.float32}
    assert any("scale_shift_table" in name for name in kept)
    assert {m.dtype for m in model.transformer.modules() if isinstance(m, QuantLinear)} >= {torch.bfloat16}


@pytest.mark.parametrize("name", ["flux", "qwen_image", "wan"])
def test_saved_it_is_loaded_to_the_same_bits(name, folders, tmp_path):
    folder, call = folders(name)
    pipe = load_pipeline(folder, "fp8", dtype=torch.bfloat16, **absent(folder))
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors").is_file()
    again = loaded(tmp_path / "saved")
    pipe.set_progress_bar_config(disable=True)
    same_state(pipe.transformer, again.transformer)
    assert quantized(again) == quantized(pipe)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    drawn = [
        p(**call, generator=g, output_type="np")[0] for p, g in zip((pipe, again), generators, strict=True)
    ]
    assert np.array_equal(*drawn)


def test_shards_are_read_and_written(folders, tmp_path):
    folder, _ = folders("flux")
    plain = FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    asked = {"dtype": torch.bfloat16, "quantization_config": QuantportConfig("int8")}
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "shards", **asked)
    same_state(model, FluxTransformer2DModel.from_pretrained(folder / "transformer", **asked))
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert (tmp_path / "again/diffusion_pytorch_model.safetensors.index.json").is_file()
    same_state(model, FluxTransformer2DModel.from_pretrained(tmp_path / "again", dtype=torch.bfloat16))


def test_text_encoders_are_quantized_by_transformers(folders, tmp_path):
    folder, call = folders("flux")
    parts = {
        "transformer": {"method": "int8"},
        "text_encoder_2": "int8_weight_only",
        "text_encoder": None,
        "vae": None,
    }
    pipe = load_pipeline(folder, parts, dtype=torch.bfloat16, **absent(folder))
    assert plans(pipe).keys() == {"transformer", "text_encoder_2"}
    plain = loaded(folder)
    same_state(pipe.vae, plain.vae)
    same_state(pipe.text_encoder, plain.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(**call, output_type="np")[0]).all()


def test_the_forms_of_diffusers_mean_the_same(folders):
    folder, _ = folders("z_image")
    parts = absent(folder)
    by_name = {"quant_method": "quantport", "scheme": "int8"}
    one = loaded(folder, quantization_config=PipelineConfig({"transformer": "int8"}))
    mapping = diffusers_mapping({"transformer": QuantportConfig("int8")})
    for pipe in (
        loaded(folder, quantization_config=mapping),
        load_pipeline(folder, {"transformer": by_name}, dtype=torch.bfloat16, **parts),
        load_pipeline(folder, QuantportConfig("int8"), dtype=torch.bfloat16, **parts),
    ):
        same_state(pipe.transformer, one.transformer)


def diffusers_mapping(mapping):
    from diffusers.quantizers import PipelineQuantizationConfig

    return PipelineQuantizationConfig(quant_mapping=mapping)


def test_the_plan_is_logged_once(folders, caplog):
    folder, _ = folders("z_image")
    with caplog.at_level(logging.INFO, "quantport_diffusers"):
        load_pipeline(folder, "int8", dtype=torch.bfloat16, **absent(folder))
    assert len([r for r in caplog.records if r.name == "quantport_diffusers"]) == 1


def test_without_a_dtype_it_is_fp32_as_ever(folders):
    folder = folders("flux")[0] / "transformer"
    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=QuantportConfig("int8"))
    assert {p.dtype for p in model.parameters() if p.numel()} == {torch.float32}
    assert {m.dtype for m in model.modules() if isinstance(m, QuantLinear)} == {torch.float32}


def _asked(folder, config, **options):
    return DiffusionPipeline.from_pretrained(folder, quantization_config=config, **options)


@pytest.mark.parametrize(
    ("components", "word"),
    [
        ({"transfomer": "int8"}, "transformer"),
        ({"tokenizer": "int8"}, "one of"),
        ({"transformer": "fp9"}, "fp9"),
        ({"transformer": {"scheme": "int8", "method": "fp8"}}, "both"),
        ({"transformer": {"scheme": "int8", "wieghts": 1}}, "wieghts"),
        ({"transformer": 8}, "int"),
        ({"vae": None}, "no component"),
        ({"scheduler": "int8"}, "no model"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_three_parts(components, word, folders):
    folder, _ = folders("z_image")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(folder, components, dtype=torch.bfloat16, **absent(folder))
    check_parts(caught.value)
    assert word in str(caught.value)


def test_several_devices_and_disk_are_refused(folders):
    folder = folders("flux")[0] / "transformer"
    for device_map in ("auto", {"transformer_blocks": "disk", "": "cpu"}, {"a": "cpu", "b": "meta"}):
        with pytest.raises(DeviceError) as caught:
            FluxTransformer2DModel.from_pretrained(
                folder, quantization_config=QuantportConfig("int8"), device_map=device_map
            )
        check_parts(caught.value)


def test_a_single_device_is_taken(folders):
    folder = folders("flux")[0] / "transformer"
    asked = {"quantization_config": QuantportConfig("int8"), "dtype": torch.bfloat16}
    one = FluxTransformer2DModel.from_pretrained(folder, **asked)
    same_state(FluxTransformer2DModel.from_pretrained(folder, device_map={"": "cpu"}, **asked), one)


def test_arguments_of_saving_that_have_no_meaning(folders, tmp_path):
    folder = folders("flux")[0] / "transformer"
    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=QuantportConfig("int8"))
    for options in (
        {"variant": "fp16"},
        {"safe_serialization": False},
        {"push_to_hub": True},
        {"unknown": 1},
    ):
        with pytest.raises(SaveError) as caught:
            model.save_pretrained(tmp_path / "out", **options)
        check_parts(caught.value)
        assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_another_configuration_for_what_quantport_quantized(folders, tmp_path):
    from diffusers import BitsAndBytesConfig

    folder = folders("flux")[0] / "transformer"
    asked = {"quantization_config": QuantportConfig("int8"), "dtype": torch.bfloat16}
    model = FluxTransformer2DModel.from_pretrained(folder, **asked)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError) as caught:
        FluxTransformer2DModel.from_pretrained(
            tmp_path / "saved", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )
    check_parts(caught.value)
    with pytest.raises(QuantportError):
        FluxTransformer2DModel.from_pretrained(tmp_path / "saved", quantization_config=QuantportConfig("fp8"))
    same_state(FluxTransformer2DModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16), model)


def test_a_damaged_file_leaves_nothing(folders, tmp_path):
    plain = FluxTransformer2DModel.from_pretrained(folders("flux")[0] / "transformer", dtype=torch.bfloat16)
    with torch.no_grad():
        plain.proj_out.weight[0, 0] = torch.nan
    plain.save_pretrained(tmp_path / "nan")
    with pytest.raises(QuantportError) as caught:
        FluxTransformer2DModel.from_pretrained(tmp_path / "nan", quantization_config=QuantportConfig("int8"))
    check_parts(caught.value)
    index = tmp_path / "shards"
    plain.save_pretrained(index, max_shard_size="40KB", variant="fp16")
    with pytest.raises(CheckpointError, match="variant"):
        FluxTransformer2DModel.from_pretrained(
            index, variant="fp16", quantization_config=QuantportConfig("int8")
        )


def test_distances_are_those_of_the_library():
    generator = np.random.default_rng(0)
    a = generator.random((2, 9, 9), np.float32)
    b = a + generator.normal(0, 0.1, a.shape).astype(np.float32)
    found, span = distance(a, b), float(a.max() - a.min())
    assert found.psnr == pytest.approx(10 * np.log10(span**2 / np.square(a - b).mean()), rel=1e-5)
    assert found.ssim == pytest.approx(
        np.mean([structural_similarity(x, y, data_range=span) for x, y in zip(a, b, strict=True)])
    )
    assert distance(a[:, :2, :2], b[:, :2, :2]).ssim is None
    assert distance(a, a).psnr == float("inf")


def test_the_configuration_is_plain_data():
    config = QuantportConfig("fp8", ignore=["proj_out"])
    assert json.loads(config.to_json_string()) == config.to_dict()
    assert QuantportConfig.from_dict(config.to_dict()) == config
    assert "fp8" in repr(config)
    with pytest.raises(ConfigError):
        QuantportConfig("fp8", quant_method="bitsandbytes")
