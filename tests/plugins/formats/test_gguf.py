"""GGUF files that gguf 0.19 wrote: read exactly, kept, converted, and refused where they lie."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from format_checks import converts, held, keeps, overlays

pytest.importorskip("gguf")
import gguf
import transformers
from core_models import same_bits
from gguf_files import HIDDEN, KINDS, KV_HEADS, SIZES, Made, encoded, in_order, made, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantport
from quantport.checkpoint import recognize
from quantport.errors import CheckpointError, QuantportError
from quantport.scheme.catalog import BUILTIN
from quantport_formats.gguf import Gguf
from quantport_formats.gguf_config import config_of
from quantport_formats.gguf_header import TYPES, read_header
from quantport_formats.gguf_source import GgufSource

CHECKED_BY = "gguf 0.19; what is written, llama.cpp of llama-cpp-python 0.3.36"
KEPT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
IDS = torch.arange(1, 9).view(1, -1)


def opened(path: Path) -> GgufSource:
    source = Gguf().open(path)
    assert isinstance(source, GgufSource)
    return source


def test_the_types_are_those_of_the_library() -> None:
    for number, kind in TYPES.items():
        enum = gguf.GGMLQuantizationType(number)
        assert (enum.name, gguf.GGML_QUANT_SIZES[enum]) == (kind.name, (kind.block, kind.size))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_its_name_and_its_rows_in_order(kind: str, tmp_path: Path) -> None:
    """Names are those of gguf's table; rows, norms and experts are as before the conversion."""
    model = made(kind)
    write(tmp_path / "model.gguf", model)
    source = opened(tmp_path)
    assert source.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        assert same_bits(source.read(name), tensor), name
        part = slice(tensor.shape[0] // 3, tensor.shape[0] - 1)
        assert same_bits(source.read(name, part), tensor[part]), name
    assert not source.read(next(iter(model.tensors)), slice(3, 3)).numel()
    source.verify()
    source.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_is_that_of_the_model(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    write(tmp_path / "model.gguf", model)
    found = transformers.AutoConfig.for_model(**config_of(opened(tmp_path)))
    expected = model.model.config
    keys = [*SIZES, "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "sliding_window", "model_type"]
    keys += ["head_dim", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"]
    keys.append("shared_expert_intermediate_size")
    for key in keys:
        a, b = (getattr(config, key, None) for config in (found, expected))
        if key == "rms_norm_eps":
            assert a == pytest.approx(b, rel=1e-6)
        elif key != "head_dim" or b is not None:
            assert a == b, key
    assert found.architectures == [type(model.model).__name__]


def test_transformers_reads_the_same_configuration(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", made("llama"))
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    expected = load_gguf_checkpoint(tmp_path / "model.gguf")["config"]
    found = config_of(opened(tmp_path))
    assert {key: found[key] for key in expected if key in found} == {
        key: value for key, value in expected.items() if key in found
    }
    assert not {"hidden_size", "rope_theta", "num_key_value_heads"} - expected.keys()


def decoded(
    model: Made, written: dict[str, np.ndarray], source: GgufSource, kind: str
) -> dict[str, np.ndarray]:
    """What the library makes of each matrix, by its name elsewhere."""
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[model.architecture]
    table = gguf.get_tensor_name_map(arch, SIZES["num_hidden_layers"])
    out = {}
    for name in source.weights:
        stored = f"{table.get_name(name.removesuffix('.weight'))}.weight"
        if stored in written and written[stored].dtype == np.uint8:
            values = gguf.quants.dequantize(written[stored], gguf.GGMLQuantizationType[kind])
            out[name] = in_order(values, stored, model.architecture)
    return out


@dataclass
class Stored:
    """A model in one type, for `format_checks`; embedding and head too, unless only layers are asked for."""

    model: Made
    kind: str
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    schemes: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, tuple[float, int]] = field(default_factory=dict)
    only_layers: bool = False

    @property
    def scheme(self) -> str:
        return self.kind.lower()

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        layers = ("_q", "_k", "_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        types = dict.fromkeys(layers, self.kind) if self.only_layers else self.kind
        written = write(folder / "model.gguf", self.model, types)
        values = decoded(self.model, written, opened(folder), self.kind)
        self.values.update({name: torch.from_numpy(found) for name, found in values.items()})
        return folder


@pytest.mark.parametrize("kind", KEPT)
def test_blocks_are_kept_and_their_values_are_those_of_the_library(kind: str, tmp_path: Path) -> None:
    """Embedding and tied head too."""
    stored = Stored(made("llama", tied=True), kind)
    model = keeps(stored, tmp_path)  # type: ignore[arg-type]  # written as GGUF
    assert len(stored.values) == 1 + 7 * SIZES["num_hidden_layers"]
    assert model.lm_head(torch.ones(1, HIDDEN, dtype=torch.bfloat16)).shape == (1, SIZES["vocab_size"])


def test_blocks_become_another_scheme(tmp_path: Path) -> None:
    converts(Stored(made("llama"), "Q4_1", only_layers=True), tmp_path)  # type: ignore[arg-type]


def test_what_was_left_is_quantized(tmp_path: Path) -> None:
    overlays(Stored(made("llama"), "Q4_K", only_layers=True), tmp_path, "lm_head")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["qwen2moe", "qwen3moe", "mixtral", "gemma3", "phi3"])
def test_models_answer_as_the_original(kind: str, tmp_path: Path) -> None:
    """In Q8_0, whose error is small: a wrong name, row or constant would not be."""
    model = made(kind)
    write(tmp_path / "model.gguf", model, {"gate_inp": "F32", "": "Q8_0"})
    loaded = quantport.load(tmp_path / "model.gguf", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        expected, found = model.model(IDS).logits, loaded(IDS).logits
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert "q8_0" in {scheme for scheme, _ in held(loaded).values()}


@pytest.mark.parametrize("kind", ["MXFP4", "IQ4_NL"])
def test_numbers_of_types_that_are_no_blocks_here(kind: str, tmp_path: Path) -> None:
    model = made("llama")
    written = write(tmp_path / "model.gguf", model, {"ffn_up": kind, "ffn_down": kind})
    source = opened(tmp_path)
    checkpoint = recognize(source, {}, BUILTIN, [Gguf()])
    for layer in range(2):
        stored = written[f"blk.{layer}.ffn_up.weight"]
        expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert same_bits(checkpoint.source.read(name), torch.from_numpy(expected))
        assert same_bits(checkpoint.source.read(name, slice(5, 77)), torch.from_numpy(expected[5:77]))
    if kind == "MXFP4":
        (weight,) = checkpoint.quantized()["model.layers.1.mlp.up_proj"].values()
        assert weight.scheme.name == "mxfp4_weight_only"
        assert not checkpoint.notices()
    else:
        assert not checkpoint.quantized()
        assert "4 tensors of type IQ4_NL are decoded" in checkpoint.notices()[0]
        assert source.tensors["model.layers.0.mlp.up_proj.weight"].dtype is torch.bfloat16


def test_every_code_of_mxfp4(tmp_path: Path) -> None:
    """All bytes under every exponent that fp32 holds."""
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    blocks = [np.append(np.uint8(e), row) for e in range(252) for row in codes]
    model = made("llama")
    model.stored["output.weight"] = np.zeros((512, 256), np.float32)
    written = write(tmp_path / "model.gguf", model, {"output": "MXFP4"})["output.weight"]
    raw = np.resize(np.stack(blocks), (512, 8, 17)).reshape(512, -1).astype(np.uint8)
    path = tmp_path / "model.gguf"
    header = read_header(path).tensors["output.weight"]
    whole = bytearray(path.read_bytes())
    assert whole[header.start : header.end] == written.tobytes()
    whole[header.start : header.end] = raw.tobytes()
    path.write_bytes(bytes(whole))
    checkpoint = recognize(opened(path), {}, BUILTIN, [Gguf()])
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    assert same_bits(checkpoint.source.read("lm_head.weight"), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_a_file_in_16_or_32_bits_is_a_plain_checkpoint(kind: str, tmp_path: Path) -> None:
    model = made("qwen2")
    write(tmp_path / "model.gguf", model, kind)
    source = opened(tmp_path)
    checkpoint = recognize(source, {}, BUILTIN, [Gguf()])
    assert not checkpoint.quantized()
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
    name = "model.layers.0.self_attn.q_proj.weight"
    if kind == "BF16":  # the library writes it as bytes
        assert source.read(name).dtype is dtype
    assert same_bits(source.read(name), model.tensors[name].to(dtype))
    plan = quantport.plan(tmp_path, "int8", device="cpu")
    assert len(plan.quantized) == 7 * SIZES["num_hidden_layers"]


def test_a_file_in_parts_is_one_model(tmp_path: Path) -> None:
    model = made("llama", tied=True)
    whole = dict(model.stored)
    names = list(whole)
    for i, part in enumerate((names[:5], names[5:])):
        model.stored = {name: whole[name] for name in part}
        write(tmp_path / f"model-{i + 1:05d}-of-00002.gguf", model, "Q8_0")
    for path in (tmp_path, tmp_path / "model-00002-of-00002.gguf"):
        assert opened(path).tensors.keys() == model.tensors.keys()
    (tmp_path / "model-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 files are absent"):
        Gguf().open(tmp_path)


def test_config_json_beside_the_file_counts_where_it_names_a_class(tmp_path: Path) -> None:
    model = made("llama")
    write(tmp_path / "model.gguf", model, "Q8_0")
    stub = {"model_type": "llama"}
    for described, own in ((stub, False), (json.loads(model.model.config.to_json_string()), True)):
        if own:
            described["architectures"] = ["LlamaForCausalLM"]
        (tmp_path / "config.json").write_text(json.dumps(described), encoding="utf-8")
        checkpoint = recognize(opened(tmp_path), described, BUILTIN, [Gguf()])
        assert (checkpoint.config() is None) is own
        assert quantport.load(tmp_path, device="cpu").config.hidden_size == HIDDEN


def test_frequencies_of_llama_3_are_found_again(tmp_path: Path) -> None:
    model = made("llama")
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500000.0, **scaling})
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    scaled, _ = init(config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    model.values["llama.rope.freq_base"] = 500000.0
    model.stored["rope_freqs.weight"] = (plain / scaled).numpy()
    write(tmp_path / "model.gguf", model, "Q8_0")
    source = opened(tmp_path)
    checkpoint = recognize(source, {}, BUILTIN, [Gguf()])
    assert config_of(source)["rope_scaling"] == scaling
    assert not checkpoint.notices()
    assert "rope_freqs.weight" not in checkpoint.source.tensors
    model.stored["rope_freqs.weight"][3] = 7
    write(tmp_path / "model.gguf", model, "Q8_0")
    checkpoint = recognize(opened(tmp_path), {}, BUILTIN, [Gguf()])
    assert "rope_freqs.weight" in checkpoint.notices()[0]


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Gguf().open(path)
    assert caught.value.asked
    assert caught.value.suggestion


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"", "truncated"),
        (b"GGUX" + bytes(100), "begins with"),
        (struct.pack("<4sI", b"GGUF", 9), "version 9"),
        (struct.pack(">4sI", b"GGUF", 3), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0), "at most 500,000 tensors|tensors"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), "keys"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**64 - 1), "bytes of the key"),
        (struct.pack("<4sIQQQ1sIQ", b"GGUF", 3, 0, 1, 1, b"k", 8, 2**40), "truncated"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**60), "texts in lists"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 4, 2**62), "truncated"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1), "a list of values of type 9"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 99), "type 99"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 0, 1, b"t", 2**31), "dimensions"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 32, 99, 0), "type 99"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 33, 8, 0), "whole blocks"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 2**62, 0, 0), "whole blocks"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 32, 0, 1), "no multiple of 32"),
        (struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 2**40, 0, 0), "truncated"),
        (struct.pack("<4sIQQQ17sII", b"GGUF", 3, 0, 1, 17, b"general.alignment", 4, 3), "power of two"),
        (struct.pack("<4sIQQQ1s", b"GGUF", 3, 0, 1, 1, b"\xff"), "UTF-8"),
    ],
)
def test_headers_that_lie_are_refused(header: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header)
    refused(path, match)


def test_what_a_file_cannot_be_is_refused(tmp_path: Path) -> None:
    model, path = made("llama"), tmp_path / "model.gguf"
    heads = model.values["llama.attention.head_count_kv"]
    for value, match in ((7, "heads"), (0, "heads")):
        model.values["llama.attention.head_count_kv"] = value
        write(path, model)
        refused(path, match)
    model.values["llama.attention.head_count_kv"] = heads
    model.stored["blk.0.unheard.weight"] = model.stored["blk.0.ffn_up.weight"]
    write(path, model)
    refused(path, "unheard")
    del model.stored["blk.0.unheard.weight"]
    write(path, model, "Q8_0")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    refused(path, "truncated")
    path.write_bytes(whole.replace(b"llama", b"lalma"))
    refused(path, "architecture 'lalma'")
    (tmp_path / "other.gguf").write_bytes(whole)
    refused(tmp_path, "2 models")
    assert heads == KV_HEADS


def test_iq_types_want_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.gguf", made("llama"), {"ffn_up": "IQ4_NL"})
    source = opened(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"quantport\[gguf\]"):
        recognize(source, {}, BUILTIN, [Gguf()])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder / "model.gguf", made("llama"), "Q8_0")
    first = min(t.start for t in read_header(folder / "model.gguf").tensors.values())
    return folder / "damaged.gguf", (folder / "model.gguf").read_bytes(), first


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_raise_errors_of_quantport_alone(
    small: tuple[Path, bytes, int], data: st.DataObject
) -> None:
    path, whole, header = small
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from((len(whole), header, header // 2)))])
    try:
        source = Gguf().open(path)
        assert source is not None
        checkpoint = recognize(source, {}, BUILTIN, [Gguf()])
        checkpoint.layers()
        checkpoint.config()
        checkpoint.notices()
    except QuantportError:
        pass


def test_random_blocks_are_what_they_are_said_to_be() -> None:
    values = np.zeros((4, 256), np.float32)
    for name in ("Q2_K", "IQ4_NL"):
        kind = gguf.GGMLQuantizationType[name]
        assert np.isfinite(gguf.quants.dequantize(encoded(values, kind), kind)).all()
