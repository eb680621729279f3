"""Building a model leaves other threads alone, and makes what Transformers makes under its process-wide
default dtype.
"""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from core_models import DENSE, MOE, Tiny, made, same_bits, same_state, write
from torch import nn

import quantport
from quantport.loading.build_context import as_usual, building

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DEEP = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "first_k_dense_replace": 1,
}
SIDES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
PATCHES = {**SMALL, "image_size": 32, "patch_size": 8}
MODELS = {
    "LlamaForCausalLM": SMALL,
    "Gemma3ForCausalLM": {**SMALL, "head_dim": 8},
    "Qwen3MoeForCausalLM": {**SMALL, **EXPERTS},
    "MixtralForCausalLM": {**SMALL, "num_local_experts": 4},
    "DeepseekV3ForCausalLM": {**SMALL, **DEEP, "num_experts_per_tok": 2},
    "GptOssForCausalLM": {**SMALL, "num_local_experts": 4, "head_dim": 8},
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 64,
    },
    "BertModel": SMALL,
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
    "GPTNeoForCausalLM": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 32,
        "attention_types": [[["global", "local"], 1]],
    },
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4},
    "ViTModel": PATCHES,
    "SwinModel": {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2]},
    "CLIPModel": {"text_config": SMALL, "vision_config": PATCHES, "projection_dim": 16},
    "M2M100Model": {"d_model": 32, "vocab_size": 64, **SIDES, "max_position_embeddings": 32},
    "WhisperModel": {"d_model": 32, "vocab_size": 64, "num_mel_bins": 8, **SIDES, "pad_token_id": 0},
}


def config_of(name):
    return getattr(transformers, name).config_class(**MODELS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_that_of_transformers(name, dtype):
    cls = getattr(transformers, name)
    expected = cls._from_config(config_of(name), dtype=dtype)
    with building():
        found = cls._from_config(config_of(name), dtype=dtype)
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.dtype == expected.dtype
    assert found._keep_in_fp32_modules == expected._keep_in_fp32_modules
    dtypes = [
        {n: (p.dtype, p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (found, expected)
    ]
    assert dtypes[0] == dtypes[1]
    assert all(p.is_meta for p in found.parameters())
    buffers = [dict(m.named_buffers()) for m in (found, expected)]
    assert buffers[0].keys() == buffers[1].keys()
    for key, buffer in buffers[0].items():
        assert buffer.dtype == buffers[1][key].dtype, key
        assert same_bits(buffer.reshape(-1), buffers[1][key].reshape(-1)), key


def test_types_of_python_are_dtypes():
    """As GPT-Neo makes its masks, and many a table of indices."""
    with building():
        torch.set_default_dtype(torch.bfloat16)
        made = {
            torch.int64: [torch.zeros(300, dtype=int), torch.ones(3).to(int), torch.full((2,), 2, dtype=int)],
            torch.bool: [torch.ones(3, dtype=bool), torch.zeros(2**25, dtype=bool), torch.arange(3).to(bool)],
            torch.float64: [
                torch.eye(2, dtype=float),
                torch.linspace(0, 1, 3, dtype=float),
                torch.arange(3).to(float),
            ],
        }
    assert {dtype: {tensor.dtype for tensor in tensors} for dtype, tensors in made.items()} == {
        dtype: {dtype} for dtype in made
    }


def test_defaults_of_operations_that_no_factory_makes():
    def asked():
        whole, mask = torch.arange(300), torch.tensor([True, False])
        made = (
            whole / 7,
            2.0 ** (whole / 300),
            whole.sqrt(),
            whole * 0.1,
            torch.where(mask, 0.1, 0.7),
            torch.full((2,), 0.3),
            torch.tensor([[0.1, 2]]),
            torch.linspace(0, 1, 5),
            torch.full((2,), 3),
            torch.tensor(7),
            whole.float(),
            whole.to(torch.float64),
            torch.tensor(whole.numpy()),
            torch.as_tensor(torch.ones(2, dtype=torch.float64)),
            torch.normal(0.0, 1.0, (5,)),
            torch.rand(3),
            torch.arange(0, 1, 0.3),
            torch.randint(9, (3,)),
            torch.fft.fftfreq(6),
            torch.zeros(2, dtype=torch.float32),
        )
        return [*made, torch.get_default_dtype()]

    found = []
    for place in (building, as_usual):
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        with place():
            try:
                torch.set_default_dtype(torch.bfloat16)
                found.append(asked())
            finally:
                torch.set_default_dtype(before)
    for ours, expected in zip(*found, strict=True):
        assert ours is expected or (
            ours.dtype == expected.dtype and same_bits(ours.reshape(-1), expected.reshape(-1))
        )


class Watch:
    """A thread that asks for the defaults, and makes modules, until it is told to stop."""

    def __init__(self):
        self.stop, self.seen = threading.Event(), set()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.stop.is_set():
            self.seen.add(
                (torch.get_default_dtype(), torch.zeros(1).dtype, nn.Linear(1, 1).weight.device.type)
            )

    def __enter__(self):
        self.thread.start()
        return self.seen

    def __exit__(self, *args):
        self.stop.set()
        self.thread.join()


def test_other_threads_see_their_defaults_while_models_are_built():
    with Watch() as seen:
        for _ in range(3):
            for folder in (DENSE, MOE):
                quantport.load(folder, "int8")
    assert seen == {(torch.float32, torch.float32, "cpu")}


def test_a_default_that_a_factory_sets_is_that_of_its_thread():
    def factory():
        torch.set_default_dtype(torch.float64)
        told.append(torch.ones(1).dtype)
        return Tiny()

    told = []
    with Watch() as seen, building():
        assert factory().up.weight.dtype is torch.float64
    assert told == [torch.float64]
    assert torch.get_default_dtype() is torch.float32
    assert seen == {(torch.float32, torch.float32, "cpu")}


def test_inside_a_factory_a_load_is_as_usual():
    with building():
        torch.set_default_dtype(torch.float64)
        with as_usual():
            assert nn.Linear(1, 1).weight.device.type == "cpu"
            assert torch.ones(1).dtype is torch.get_default_dtype() is torch.float32
        assert nn.Linear(1, 1).weight.is_meta
    assert not nn.Linear(1, 1).weight.is_meta


class Zeros(nn.Module):
    """Experts as Llama 4 makes them, and a table that stays."""

    def __init__(self, rows):
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(rows, 2**10, requires_grad=True))
        self.register_buffer("table", torch.zeros((2**12, 2**12), device="cpu", dtype=torch.float16))


def anonymous():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads its memory as Linux shows it")
def test_large_zeros_take_no_memory_until_they_are_written(monkeypatch):
    base = anonymous()
    with building():
        torch.set_default_dtype(torch.bfloat16)
        peaks = []
        monkeypatch.setattr(nn, "Parameter", lambda data: peaks.append(anonymous()) or data)
        Zeros(2**18)
    assert peaks[0] - base < 2**24, "half a gigabyte of parameters"


def test_large_zeros_are_those_of_torch():
    with building():
        torch.set_default_dtype(torch.bfloat16)
        module = Zeros(2**15)
        few, complete = torch.zeros(3), torch.zeros(2**15, 2**10, dtype=torch.complex64)
        assert torch.zeros(2**25, device="meta").is_meta
        out = torch.ones(2**24)
        assert torch.zeros(2**24, out=out) is out
    assert module.experts.is_meta
    assert module.experts.dtype is few.dtype is torch.bfloat16
    assert complete.shape == (2**15, 2**10)
    assert complete.dtype is torch.complex64
    table = copy.deepcopy(module).table
    assert not module.table.any()
    assert module.table.is_contiguous()
    module.table[5] += 1
    assert module.table.sum() == 2**12
    assert not table.any()


def test_a_factory_may_load_a_model_itself(tmp_path):
    class Tied(Tiny):
        def tie_weights(self):
            self.again = self.norm.weight

    folder, inner = write(tmp_path / "c", made()), []

    def factory():
        torch.set_default_dtype(torch.bfloat16)
        inner.append(quantport.load(folder, "int8", model=Tied))
        return Tiny()

    def load():
        outer.append(quantport.load(folder, "int8", model=factory))

    outer = []
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(60)
    assert outer, "it waits for itself"
    assert not any(p.is_meta for p in inner[0].parameters())
    assert inner[0].again is inner[0].norm.weight
    del inner[0].again
    same_state(inner[0], outer[0])
