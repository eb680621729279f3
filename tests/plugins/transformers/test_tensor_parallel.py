"""``tp_plan`` and ``DistributedConfig``, by real processes that speak over gloo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_models import same_bits
from core_transformers import SIZES as SMALL
from core_transformers import checkpoint, tiny
from hf_models import IDS, QuantportConfig, from_pretrained, logits, save, transformers
from safetensors import safe_open
from safetensors.torch import save_file

from quantport.engine import QuantLinear, QuantModule, join_shards

WORKER = Path(__file__).parent / "tp_worker.py"
# shards of two ranks are whole blocks of 128
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 128, "num_key_value_heads": 2}
FOUR = {**SIZES, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
SCHEMES = (
    "int8",
    "int8_weight_only",
    "fp8_per_tensor",
    "fp8_per_block",
    "int4_weight_only",
    "nvfp4_weight_only",
    "nf4:double",
)
MIXED = {"scheme": "int8_weight_only", "targets": {"*.o_proj": "fp8_per_tensor"}, "ignore": ["*.k_proj"]}
MOE_SCHEMES = ("int8_weight_only", "fp8_per_tensor")
OTHERS = ("phi3", "deepseek_v3")
COLUMNS = ("o_proj", "down_proj")


def run(folder, cases, ranks):
    """What each case comes to on each rank."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(ranks)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(ranks)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), said
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(ranks)] for name in cases}


def case(path, config, **options):
    config = {"scheme": config} if isinstance(config, str) else config
    return {"paths": [str(path)], "config": config, "parallel": {"tp_size": 2}, **options}


def joined(parts, path, name, spec):
    """The stored tensors of a weight, of the shards of all ranks; or of one, where each has the whole."""
    shards = [part["stored"][path][name] for part in parts]
    if all(shards[0][key].shape == shape for key, (shape, _) in spec.scheme.layout(spec.n, spec.k).items()):
        assert all(same_bits(shard[key], shards[0][key]) for shard in shards for key in shards[0])
        return shards[0]
    return join_shards(shards, spec.scheme, int(f"{path}.{name}".rstrip(".").endswith(COLUMNS)))


def same_weights(parts, model):
    """The shards of all ranks are what one process has, to the bit."""
    assert not any("error" in part for part in parts), parts
    modules = {path: m for path, m in model.named_modules() if isinstance(m, QuantModule)}
    assert modules
    for path, module in modules.items():
        for name, spec in module.specs.items():
            found = joined(parts, path, name, spec)
            for key, tensor in module.stored_weight(name).items():
                assert same_bits(found[key], tensor), (path, name, key)
    assert all(part["stored"].keys() == modules.keys() for part in parts)


def same_logits(parts, model, tolerance=1e-5):
    """Up to the order in which the products of the ranks are summed; every rank has the same."""
    expected = logits(model)
    for part in parts:
        assert torch.equal(part["logits"], parts[0]["logits"])
        assert torch.equal(part["tokens"], parts[0]["tokens"])
    assert (parts[0]["logits"] - expected).abs().max() < tolerance * expected.abs().max()
    if tolerance < 1e-4:
        model.train()(IDS, labels=IDS).loss.backward()
        gradient = model.model.layers[0].post_attention_layernorm.weight.grad
        assert (parts[0]["gradient"] - gradient).abs().max() < 10 * tolerance * gradient.abs().max()
        model.eval()
        assert torch.equal(parts[0]["tokens"], model.generate(IDS, max_new_tokens=4, do_sample=False))


def phi3(folder):
    """Projections of attention and MLP are one weight each, of which every rank needs all outputs."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(**{**SMALL, "num_key_value_heads": 2}, tie_word_embeddings=False)
    return checkpoint(folder, transformers.Phi3ForCausalLM(config).to(torch.bfloat16))


def llama4(folder):
    sizes = {**SMALL, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_key_value_heads": 2}
    config = transformers.Llama4TextConfig(**sizes, attn_temperature_tuning=False)
    return checkpoint(folder, transformers.Llama4ForCausalLM(config).to(torch.bfloat16))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp")
    out = {
        "dense": checkpoint(folder / "dense", tiny("qwen2", tie_word_embeddings=True, **SIZES)),
        "moe": save(folder / "moe", "moe", num_key_value_heads=2),
        "deepseek_v3": save(folder / "deepseek_v3", "deepseek_v3"),
        "phi3": phi3(folder / "phi3"),
        "llama4": llama4(folder / "llama4"),
    }
    from_pretrained(out["dense"], "int8_weight_only").save_pretrained(folder / "compressed")
    from_pretrained(out["dense"], "fp8_per_tensor").save_pretrained(folder / "compressed-fp8")
    with pytest.warns(UserWarning, match="quantport"):
        from_pretrained(out["dense"], "nf4:double").save_pretrained(folder / "own")
    return {
        **out,
        "root": folder,
        **{name: folder / name for name in ("compressed", "compressed-fp8", "own")},
    }


STORED = {"compressed": {}, "compressed-fp8": {}, "compressed converted": {"scheme": "int8"}, "own": None}


def with_nan(folder, source):
    """A checkpoint with a NaN in the second half of the columns of a weight."""
    shutil.copytree(source, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    tensors["model.layers.1.mlp.down_proj.weight"][3, -1] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def cut_off(folder, source):
    shutil.copytree(source, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    return folder


def failing(folders):
    """What fails, on one rank or on all; the last of them breaks the group."""
    root, dense, moe = folders["root"], folders["dense"], folders["moe"]
    bad = {"nan": with_nan(root / "nan", dense), "cut": cut_off(root / "cut", dense)}
    missing = root / "missing"
    shutil.copytree(dense, missing)
    (missing / "model.safetensors").unlink()
    int8 = case(dense, "int8")
    return {
        "blocks": case(moe, "fp8_per_block"),
        "embedding": case(dense, {"targets": dict.fromkeys(("model.embed_tokens", "lm_head"), "int8")}),
        "own plan": case(
            dense,
            "int8",
            parallel={"tp_size": 2, "tp_plan": {"model.layers.*.mlp.up_proj": "packed_colwise"}},
        ),
        "fused": case(folders["phi3"], "fp8_per_tensor"),
        "sorted experts": case(folders["llama4"], "int8"),
        "save": {**int8, "save": str(root / "saved")},
        "save under FSDP": {**int8, "save": str(root / "saved"), "parallel": {"fsdp_size": 2}},
        **{name: {**int8, "paths": [str(dense), str(path)]} for name, path in bad.items()},
        "missing": {**int8, "paths": [str(dense), str(missing)], "wait": 5},
    }


@pytest.fixture(scope="module")
def results(folders):
    """One pair of processes for all tests: they take longer to start than to load."""
    dense, moe = folders["dense"], folders["moe"]
    cases = {f"dense {scheme}": case(dense, scheme) for scheme in SCHEMES}
    cases |= {"mixed": case(dense, MIXED), "bfloat16": case(dense, "int8_weight_only", dtype="bfloat16")}
    cases |= {f"moe {scheme}": case(moe, scheme) for scheme in MOE_SCHEMES}
    cases |= {kind: case(folders[kind], "int8_weight_only") for kind in OTHERS}
    cases |= {name: case(folders[name.split()[0]], config) for name, config in STORED.items()}
    cases |= {
        f"fsdp {kind}": case(folders[kind], "int8", parallel={"fsdp_size": 2}) for kind in ("dense", "moe")
    }
    cases["fully_shard"] = case(dense, "int8", parallel={}, fully_shard=True)
    cases["auto"] = case(dense, "int8_weight_only", parallel={"tp_plan": "auto", "tp_size": 2})
    return run(folders["root"], {**cases, **failing(folders)}, 2)


def one_process(folders, kind, config, **options):
    options = {"dtype": torch.float32, **options}
    config = {"scheme": config} if isinstance(config, str) else config
    if config is not None:
        options["quantization_config"] = QuantportConfig(**config)
    return transformers.AutoModelForCausalLM.from_pretrained(folders[kind], **options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_are_those_of_one_process(scheme, results, folders):
    parts, model = results[f"dense {scheme}"], one_process(folders, "dense", scheme)
    same_weights(parts, model)
    if scheme != "int8":
        same_logits(parts, model)


def test_each_rank_scales_its_part_of_the_activations(results, folders):
    """Finer scales than those of whole rows: no further from what unquantized activations give."""
    exact, whole = (logits(one_process(folders, "dense", s)) for s in ("int8_weight_only", "int8"))
    parts = results["dense int8"]
    assert (parts[0]["logits"] - exact).norm() < 1.1 * (whole - exact).norm()
    text = "each rank scales its part of the activations by itself"
    noted = {name.rpartition(".")[2] for name, note in parts[0]["notes"].items() if text in note}
    assert noted == set(COLUMNS)
    assert not any(text in note for note in results["dense int8_weight_only"][0]["notes"].values())


def test_a_scheme_for_each_layer_and_some_in_16_bits(results, folders):
    model = one_process(folders, "dense", MIXED)
    same_weights(results["mixed"], model)
    same_logits(results["mixed"], model)


def test_in_bfloat16(results, folders):
    """Sums are rounded to bfloat16 before they are added."""
    model = one_process(folders, "dense", "int8_weight_only", dtype=torch.bfloat16)
    same_weights(results["bfloat16"], model)
    same_logits(results["bfloat16"], model, 0.03)


@pytest.mark.parametrize("scheme", MOE_SCHEMES)
def test_experts(scheme, results, folders):
    """Rows of gate and up, columns of down, of every expert."""
    model = one_process(folders, "moe", scheme)
    same_weights(results[f"moe {scheme}"], model)
    same_logits(results[f"moe {scheme}"], model)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind, results, folders):
    """Outputs that are gathered, inputs that are split; attention that is whole on each rank."""
    model = one_process(folders, kind, "int8_weight_only")
    same_weights(results[kind], model)
    same_logits(results[kind], model)


@pytest.mark.parametrize("name", STORED)
def test_checkpoints_that_are_quantized_already(name, results, folders):
    model = one_process(folders, name.split()[0], STORED[name])
    same_weights(results[name], model)
    if STORED[name] != {"scheme": "int8"}:
        same_logits(results[name], model)


def test_auto_is_the_plan_of_the_model(results, folders):
    same_weights(results["auto"], one_process(folders, "dense", "int8_weight_only"))


def test_each_rank_holds_half_and_says_so(results, folders):
    for kind in ("dense", "moe"):
        model = one_process(folders, kind, "fp8_per_tensor")
        modules = [m for m in model.modules() if isinstance(m, QuantModule)]
        whole = sum(t.nbytes for m in modules for _, t in m.stored_tensors())
        for rank, part in enumerate(results[f"{kind} fp8_per_tensor"]):
            assert part["bytes"] <= 0.51 * whole
            assert f"rank {rank} of 2" in part["plan"]


@pytest.mark.parametrize("name", ["fsdp dense", "fsdp moe", "fully_shard"])
def test_what_fsdp_shards_is_what_stays(name, results, folders):
    """The same bits on every rank, and the same logits: what is gathered for a call is what was sharded."""
    model = one_process(folders, "moe" if "moe" in name else "dense", "int8")
    expected = {path: m.stored_weight() for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    for came in results[name]:
        assert "error" not in came, came
        for path, stored in expected.items():
            assert all(same_bits(came["stored"][path][""][key], tensor) for key, tensor in stored.items())
        assert torch.equal(came["logits"], logits(model))
        assert came["sharded"] == [True] * len(came["sharded"])
        assert came["gradient"].abs().sum() > 0


REFUSED = {
    "blocks": ("ConfigError", "multiple of 128", "2 ranks"),
    "embedding": ("UnsupportedError", "model.embed_tokens", "2 ranks"),
    "own plan": ("UnsupportedError", "model.layers.0.mlp.up_proj", "packed_colwise"),
    "fused": ("ConfigError", "in one weight", "rows or groups"),
    "sorted experts": ("UnsupportedError", "feed_forward.experts", "packed_rowwise"),
    "save": ("SaveError", "a share of", "one process"),
    "save under FSDP": ("SaveError", "a share of", "one process"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_on_every_rank(name, results):
    kind, *said = REFUSED[name]
    for came in results[name]:
        assert came["error"] == kind, came
        assert all(text in came["said"] for text in (*said, "asked:", "found:", "try:"))


FAILED = {
    "nan": ("WeightError", "NaN"),
    "cut": ("CheckpointError", "model.safetensors"),
    "missing": ("OSError", ""),
}


@pytest.mark.parametrize("name", FAILED)
def test_what_one_rank_fails_at_is_an_error_on_all(name, results):
    """The others are told, or, where Transformers fails by itself, wait as long as the group lets them."""
    good, bad = results[name]
    kind, said = FAILED[name]
    assert bad["error"] == kind, bad
    assert said in bad["said"]
    assert good["error"] == "RankError", good
    assert ("does not answer" if name == "missing" else "rank 1 has failed") in good["said"]


def test_a_rank_that_has_ended_is_an_error_on_the_others(folders, tmp_path):
    broken = cut_off(tmp_path / "cut", folders["dense"])
    (broken / "config.json").unlink()
    cases = {
        "ended": {**case(folders["dense"], "int8"), "paths": [str(folders["dense"]), str(broken)], "ends": 1}
    }
    good, bad = run(tmp_path, cases, 2)["ended"]
    assert bad["error"] != "RankError"
    assert good["error"] == "RankError", good


@pytest.mark.slow
def test_four_ranks(tmp_path):
    """Of a weight in four shards the same bytes."""
    folder = checkpoint(tmp_path / "dense", tiny("qwen2", **FOUR))
    schemes = ("int8_weight_only", "fp8_per_tensor", "fp8_per_block", "nvfp4_weight_only")
    found = run(tmp_path, {s: case(folder, s, parallel={"tp_size": 4}) for s in schemes}, 4)
    for scheme in schemes:
        model = one_process({"dense": folder}, "dense", scheme)
        same_weights(found[scheme], model)
        same_logits(found[scheme], model)
