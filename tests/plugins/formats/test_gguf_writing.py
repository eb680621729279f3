"""What is saved as GGUF: the gguf library and Transformers read the numbers that we hold, and so do we.
llama.cpp itself, which is built for it, reads it in ``ci/llama``.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format_checks import held
from torch import Tensor

pytest.importorskip("gguf")
import gguf
import transformers
from core_models import DENSE, MOE, same_bits
from gguf_bases import base, logits, tokenizer, write_tokenizer
from gguf_files import SIZES, Made, in_order, made
from tokenizers import normalizers
from typer.testing import CliRunner

import quantport
from quantport.checkpoint.shard import ShardWriter
from quantport.cli.app import app
from quantport.errors import SaveError
from quantport.loading.quantize_checkpoint import quantize_checkpoint

SCHEMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
KINDS = ("llama", "qwen2", "qwen3", "qwen3moe")
TEXT = "It's 2024, isn't it?\n\n  WE'LL see 12345 <think> naïve e\u0301 None  <|end|>\t x"


def of_the_library(file: Path, architecture: str) -> dict[str, Tensor]:
    """Every number in a file, as gguf decodes it, in the order of rows that Transformers has."""
    return {
        tensor.name: torch.from_numpy(
            in_order(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name, architecture).copy()
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def checked(model: torch.nn.Module, original: Made, folder: Path) -> dict[str, Tensor]:
    """Saves a model as GGUF, and reads it in three ways."""
    out = quantport.save(model, folder / "out", format="gguf")
    numbers = of_the_library(out / "model.gguf", original.architecture)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[original.architecture]
    names = gguf.get_tensor_name_map(arch, SIZES["num_hidden_layers"])
    ours = held(model)
    decoded = dict(original.model.state_dict())
    for name, tensor in original.tensors.items():
        stem, _, leaf = name.rpartition(".")
        first, _, expert = stem.partition(".experts.")
        merged = f"{first}.experts.{expert.partition('.')[2]}" if expert else stem
        found = numbers[f"{names.get_name(merged)}.{leaf}"]
        found = found[int(expert.partition(".")[0])] if expert else found
        values = ours[name][1] if name in ours else tensor
        assert same_bits(found, values), name
        decoded[name] = values
    for path in (out, out / "model.gguf"):
        again = quantport.load(path, device="cpu", dtype=torch.float32)
        assert all(step.stored for step in again.quantport_plan.quantized)
        after = held(again)
        assert {n: s for n, (s, _) in after.items()} == {n: s for n, (s, _) in ours.items()}
        assert all(same_bits(after[name][1], values) for name, (_, values) in ours.items())
        assert same_bits(logits(again), logits(model))
    # of Qwen3, Transformers reads neither the size of heads nor that of experts in the file
    described = transformers.AutoConfig.from_pretrained(out)
    options = {"config": described} if original.architecture.startswith("qwen3") else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model.gguf", dtype=torch.float32, **options
    )
    if original.architecture != "qwen3moe":  # whose experts have other names in the model
        original.model.load_state_dict(decoded)
        assert same_bits(logits(theirs), logits(original.model))
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4
    return numbers


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, tmp_path: Path) -> None:
    """Rows of q and k too, which llama.cpp has in another order."""
    original = made("llama")
    model = quantport.load(base(tmp_path / "base", original), scheme, device="cpu", dtype=torch.float32)
    checked(model, original, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    """Routers, norms and biases in F32, embedding and head in blocks."""
    original = made(kind)
    config = {"scheme": "q8_0", "targets": {"lm_head": "q4_0", "model.embed_tokens": "q6_k"}}
    model = quantport.load(
        base(tmp_path / "base", original), config=config, device="cpu", dtype=torch.float32
    )
    checked(model, original, tmp_path)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q4_0", "Q6_K")
    small = [name for name in types if name.endswith(("norm.weight", "bias", "gate_inp.weight"))]
    assert {types[name] for name in small} == {"F32"}
    assert len(small) == {"llama": 5, "qwen2": 11, "qwen3": 9, "qwen3moe": 11}[kind]


@pytest.mark.parametrize("quantized", [False, True])
def test_tied_embeddings(quantized: bool, tmp_path: Path) -> None:
    original = made("llama", tied=True)
    targets = {"targets": dict.fromkeys(("lm_head", "model.embed_tokens"), "q5_0")} if quantized else {}
    config = {"scheme": "q4_k", **targets}
    model = quantport.load(
        base(tmp_path / "base", original), config=config, device="cpu", dtype=torch.float32
    )
    assert "output.weight" not in checked(model, original, tmp_path)


def test_biases_of_llama(tmp_path: Path) -> None:
    """Those of q and k are in the order of their rows."""
    original = made("llama")
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    original.model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in original.model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = torch.rand(parameter.shape) if "norm" in name else torch.randn(parameter.shape)
    original.tensors = dict(original.model.state_dict())
    model = quantport.load(base(tmp_path / "base", original), "q8_0", device="cpu", dtype=torch.float32)
    out = quantport.save(model, tmp_path / "out", format="gguf")
    alone = quantport.save(model, tmp_path / "alone.gguf", format="gguf")
    for path in (out, alone):
        assert same_bits(logits(quantport.load(path, device="cpu", dtype=torch.float32)), logits(model))
    numbers = of_the_library(out / "model.gguf", "")
    bias = original.tensors["model.layers.1.self_attn.k_proj.bias"]
    pairs = bias.view(SIZES["num_key_value_heads"], 2, -1).transpose(1, 2).flatten()
    assert same_bits(numbers["blk.1.attn_k.bias"], pairs)


@pytest.mark.parametrize("dtype", ["bf16", "float16", "float32"])
def test_what_is_kept_has_its_dtype(dtype: str, tmp_path: Path) -> None:
    original = made("qwen2")
    folder = base(tmp_path / "base", original)
    wanted = torch.bfloat16 if dtype == "bf16" else getattr(torch, dtype)
    config = {"scheme": "q8_0", "ignore": ["*.down_proj"]}
    model = quantport.load(folder, config=config, device="cpu", dtype=wanted)
    quantport.save(model, tmp_path / "model.gguf", format="gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    name = {"bf16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    assert {types["blk.0.ffn_down.weight"], types["token_embd.weight"]} == {name}
    assert types["blk.0.attn_q.bias"] == "F32"
    again = quantport.load(tmp_path / "model.gguf", device="cpu", dtype=wanted)
    assert same_bits(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["llama", "qwen3moe"])
def test_a_stream_in_pieces_writes_the_same_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come some at a time, and not by heads."""
    folder = base(tmp_path / "base", made(kind))
    model = quantport.load(folder, "q4_k", device="cpu", dtype=torch.float32)
    expected = quantport.save(model, tmp_path / "a" / "model.gguf", format="gguf").read_bytes()
    monkeypatch.setattr("quantport.loading.save_model.STEP", 256 * 7)
    pieces = quantport.save(model, tmp_path / "b" / "model.gguf", format="gguf")
    assert pieces.read_bytes() == expected
    options = {"device": "cpu", "dtype": torch.float32, "budget": "2MB"}
    quantize_checkpoint(folder, tmp_path / "c" / "model.gguf", "q4_k", format="gguf", **options)
    assert (tmp_path / "c" / "model.gguf").read_bytes() == expected
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["model.gguf"]


def fields(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def test_metadata(tmp_path: Path) -> None:
    model = quantport.load(DENSE, "q4_0", device="cpu")
    found = fields(quantport.save(model, tmp_path / "small.gguf", format="gguf"))
    assert {k.removeprefix("llama."): v for k, v in found.items() if k.startswith(("general", "llama"))} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "small",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": 2,
        "block_count": 6,
        "context_length": 512,
        "embedding_length": 256,
        "feed_forward_length": 704,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "vocab_size": 2048,
    }
    model = quantport.load(MOE, "q8_0", device="cpu")
    found = fields(quantport.save(model, tmp_path / "experts.gguf", format="gguf"))
    experts = ("expert_count", "expert_used_count", "expert_feed_forward_length")
    assert [found[f"qwen3moe.{key}"] for key in experts] == [8, 2, 160]


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_that_are_scaled(rope: dict[str, Any], tmp_path: Path) -> None:
    original = made("llama")
    config = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500000.0, **rope})
    state = original.model.state_dict()
    original.model = transformers.LlamaForCausalLM(config).eval()
    original.model.load_state_dict(state)
    model = quantport.load(base(tmp_path / "base", original), "q8_0", device="cpu", dtype=torch.float32)
    file = quantport.save(model, tmp_path / "model.gguf", format="gguf")
    assert same_bits(logits(quantport.load(file, device="cpu", dtype=torch.float32)), logits(model))
    if rope["rope_type"] == "llama3":
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
        scaled, _ = init(config, torch.device("cpu"))
        plain = 1 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
        assert torch.allclose(of_the_library(file, "")["rope_freqs.weight"], plain / scaled, rtol=1e-5)


@pytest.mark.parametrize(
    ("pre", "nfc"),
    [("gpt-2", False), ("smollm", True), ("llama-bpe", False), ("qwen2", True), ("qwen2", False)],
)
def test_the_tokenizer_goes_there_and_back(pre: str, nfc: bool, tmp_path: Path) -> None:
    """Out of the file alone comes one that gives the same tokens."""
    original = tokenizer(pre)
    if nfc:
        original.normalizer = normalizers.NFC()
    folder = base(tmp_path / "base", made("llama"))
    write_tokenizer(folder, original)
    file = quantport.save(quantport.load(folder, "q8_0", device="cpu"), tmp_path / "m.gguf", format="gguf")
    found = {k.removeprefix("tokenizer."): v for k, v in fields(file).items() if k.startswith("tokenizer.")}
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", pre)
    ids = original.get_vocab()
    assert {token: i for i, token in enumerate(found["ggml.tokens"]) if i < len(ids)} == ids
    assert found["ggml.tokens"][-1] == f"[PAD{SIZES['vocab_size'] - 1}]"
    types = found["ggml.token_type"]
    assert [types[ids[word]] for word in ("<|begin|>", "<|end|>", "<think>", "a")] == [3, 3, 4, 1]
    assert types[-1] == 5
    assert found["ggml.merges"][0] == "t h"
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"]) == (0, 1)
    assert found["ggml.add_bos_token"] is (pre == "llama-bpe")
    assert found["chat_template"].startswith("{% for m in messages")
    again = quantport.save(quantport.load(file, device="cpu", dtype=torch.float32), tmp_path / "again")
    read = transformers.AutoTokenizer.from_pretrained(again)
    assert read(TEXT).input_ids == original.encode(TEXT).ids
    assert (read.bos_token, read.eos_token) == ("<|begin|>", "<|end|>")
    assert (read.unk_token, read.sep_token, read.mask_token) == (None, None, None)  # "None" is a word
    assert read.chat_template == found["chat_template"]
    copy = quantport.save(
        quantport.load(file, device="cpu", dtype=torch.float32), tmp_path / "copy" / "m.gguf", format="gguf"
    )
    assert copy.read_bytes() == file.read_bytes()


def test_a_model_of_a_file_is_saved_with_all_that_it_needs(tmp_path: Path) -> None:
    """And with nothing else that lies beside the file."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    model = quantport.load(base(tmp_path / "base", made("llama")), "q8_0", device="cpu")
    file = quantport.save(model, downloads / "model.gguf", format="gguf")
    (downloads / "letter.txt").write_text("private")
    for name in ("quantport", "gguf"):
        out = quantport.save(
            quantport.load(file, device="cpu", dtype=torch.float32), tmp_path / name, format=name
        )
        files = {path.name for path in out.iterdir() if not path.name.startswith("model.")}
        assert files - {"quantport.json"} == {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }
        found, expected = (quantport.load(path, device="cpu", dtype=torch.float32) for path in (out, file))
        assert same_bits(logits(found), logits(expected))
    (downloads / "model.gguf").unlink()
    assert {p.name for p in downloads.iterdir()} == {"letter.txt"}


def test_what_has_no_place_is_said(tmp_path: Path) -> None:
    settings = {"scheme": "q4_0:a8", "kv_cache_dtype": "fp8"}
    model = quantport.load(DENSE, config=settings, device="cpu")
    with pytest.warns(
        UserWarning, match="how q4_0:a8 quantizes activations and the KV cache in fp8_e4m3 is not"
    ):
        file = quantport.save(model, tmp_path / "model.gguf", format="gguf")
    assert {s.requested_scheme for s in quantport.load(file, device="cpu").quantport_plan.quantized} == {
        "q4_0"
    }


def test_what_of_generating_has_no_place_in_a_file_is_said(tmp_path: Path) -> None:
    model = quantport.load(DENSE, "q8_0", device="cpu")
    quantport.save(model, tmp_path / "a.gguf", format="gguf")  # one id for each role
    model.generation_config.eos_token_id = [0, 5]
    model.generation_config.temperature = 0.3
    with pytest.warns(UserWarning, match="eos_token_id, temperature of generation_config.json is not"):
        quantport.save(model, tmp_path / "b.gguf", format="gguf")
    out = quantport.save(model, tmp_path / "out", format="gguf")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 5]


def test_what_is_there_stays(tmp_path: Path) -> None:
    model = quantport.load(DENSE, "q8_0", device="cpu")
    file, folder = tmp_path / "model.gguf", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "x").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    for path, found in (
        (file, "a file of this name"),
        (folder, "1 entry"),
        (tmp_path / "folder.gguf", "a dir"),
    ):
        with pytest.raises(SaveError) as caught:
            quantport.save(model, path, format="gguf")
        assert found in caught.value.found
    assert (file.read_text(), (folder / "x").read_text()) == ("mine", "mine")
    assert quantport.save(model, file, format="gguf", overwrite=True) == file
    out = quantport.save(model, tmp_path / "out", format="gguf")
    quantport.save(model, out, format="gguf", overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"model.gguf", "folder", "folder.gguf", "out"}


def test_the_command_line_writes_a_file_and_runs_it(tmp_path: Path) -> None:
    def ask(*words: Any, code: int = 0) -> Any:
        done = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    file, folder = tmp_path / "model.gguf", tmp_path / "folder"
    asked = ("quantize", DENSE, file, "--scheme", "q8_0", "--format", "gguf")
    assert ask(*asked[:-2])["format"] == "gguf"  # as the path says
    assert file.is_file()
    file.unlink()
    assert "of a file of gguf" in ask(*asked[:-1], "gptq", code=2)["error"]["found"]
    said = ask("quantize", DENSE, file, "-f", "gguf", code=2)["error"]["try"]
    assert "--format quantport" in said
    assert ask(*asked)["bytes_written"] == file.stat().st_size
    assert "--overwrite" in ask(*asked, code=2)["error"]["try"]
    ask(*asked, "--overwrite")
    ask("quantize", DENSE, folder, "--scheme", "q8_0")
    same = ("--prompt", "The", "--tokens", "8")
    assert len({ask("run", path, *same)["text"] for path in (file, folder)}) == 1
    ask("quantize", file, tmp_path / "again", "--format", "gguf")
    assert ask("inspect", tmp_path / "again")["format"] == "gguf"
    is_read = ask("quantize", file, file, "--format", "gguf", "--overwrite", code=2)
    assert "is read" in is_read["error"]["found"]


@pytest.mark.parametrize("method", ["write", "finish"])
@pytest.mark.parametrize("name", ["model.gguf", "folder"])
def test_a_full_disk_leaves_nothing(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantport.load(DENSE, "q8_0", device="cpu")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, method, full)
    with pytest.raises(SaveError, match="the disk is full"):
        quantport.save(model, tmp_path / name, format="gguf")
    assert not list(tmp_path.iterdir())
